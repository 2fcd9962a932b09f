"""
A conversation with a CWIC model: what is said, and what it costs. render.py shows it.

    conversation = Conversation(model, saved['tokenizer'], ChatConfig(max_tokens=100))
    turn = conversation.say('Why is the sky blue?', show=lambda kind, text, token: print(text, end=''))
    turn.reply[0].active        # weights that each matrix used in the pass over the reply's first token

A pass reads one token and predicts the next. Its compute is counted in that pass, never in a second one, and
belongs to the token that was read.

A model whose tokenizer has a chat template is spoken to in it; any other continues the text so far.

Not here: tools, several conversations at once, saving and reloading. When the text outgrows the context, the
decoder forgets the older half of it, the system prompt included.
"""

import codecs
import time
from copy import copy
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch

import weights
from build_kernel import KernelUnavailable
from decoder import Decoder, TorchDecoder
from options import SAMPLING
from sampling import REPEAT_WINDOW, sample
from tokenizer import bos_ids, dialogue_ids, load_tokenizer, stop_ids

LARGE = 20_000_000      # --dtype auto is int8 for models with more weights


@dataclass
class Token:
    id: int
    piece: bytes            # not always whole characters
    special: bool           # not text; it ends a message, for example
    active: np.ndarray      # np.int64 (M), the weights each matrix used
    share: float            # active weights / dense weights
    probability: float      # by the model, before penalty and temperature; None in a prompt


@dataclass
class Turn:
    """What was typed, and the model's reply."""
    typed: str
    before: list            # ids of the text so far
    new: list               # ids that what was typed became
    random_state: object    # of the generator, before the reply
    decoder: object         # .names and .n_weights (M) belong to every active count
    engine: str             # the decoder's dtype and threads, for people
    prompt: list = field(default_factory=list)      # of Token: those of new that fit the context
    reply: list = field(default_factory=list)       # of Token, also those of a stop sequence
    shown: list = field(default_factory=list)       # ('prompt' or 'reply', text, Token or None), in order
    seconds: list = field(default_factory=list)     # for reading the prompt, and for each token of the reply
    ended: str = 'length'   # or 'stop', 'end', 'interrupt'

    @property
    def text(self):
        return ''.join(text for kind, text, _ in self.shown if kind == 'reply')

    @property
    def share(self):
        return sum(token.share for token in self.reply) / len(self.reply) if self.reply else None

    @property
    def speed(self):
        """Tokens per second after the first, or None."""
        return (len(self.reply) - 1) / sum(self.seconds[2:]) if len(self.reply) > 1 else None

    def emit(self, kind, chars, show):
        """chars: [(character, Token)]; the characters of one token are shown together."""
        for _, run in groupby(chars, key=lambda pair: id(pair[1])):
            texts, tokens = zip(*run)
            self.shown.append((kind, ''.join(texts), tokens[0]))
            show(*self.shown[-1])


class StreamDecoder:
    """
    Turns tokens into text, as lists of (character, token). A character comes with the token that completes
    its bytes. Text that may be the beginning of a stop sequence is held back.
    """

    def __init__(self, stops=()):
        self.utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        self.stops, self.held, self.last, self.stopped = stops, [], None, False

    def feed(self, token):
        self.last = token
        self.held += [(char, token) for char in self.utf8.decode(b'' if token.special else token.piece)]
        text = ''.join(char for char, _ in self.held)
        found = [text.index(stop) for stop in self.stops if stop in text]
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        ready = min(found) if found else len(text) - max(begun, default=0)
        self.stopped = bool(found)
        shown, self.held = self.held[:ready], self.held[ready:]
        return shown

    def end(self):
        """The rest, except a stop sequence; U+FFFD stands for an incomplete character."""
        rest = self.held + [(char, self.last) for char in self.utf8.decode(b'', final=True)]
        return [] if self.stopped else rest


# -----------------------------------------------------------------------------


def make_decoder(model, config, dense):
    """-> a decoder, its dtype and threads as text, and None or why there is no kernel. Raises ValueError."""
    dtype = config.dtype
    if dtype == 'auto':
        dtype = 'int8' if model.n_weights() > LARGE else 'f32'
    try:
        decoder = Decoder(model, dtype, config.threads, dense)
    except KernelUnavailable as error:
        return TorchDecoder(model, dense), 'f32, PyTorch', str(error)
    return decoder, f'{dtype}, {decoder.threads} thread{"s" * (decoder.threads > 1)}', None


def unescape(text):
    return text.replace('\\n', '\n').replace('\\t', '\t')


class Conversation:
    """
    The text so far, as token ids, and its turns. config may be replaced between turns.
    show(kind, text, token) is called with each piece of text as it comes. KeyboardInterrupt ends a reply.
    base: an adapter's dense model, by the name that weights.load takes; else None.
    """

    def __init__(self, model, spec, config, base=None):
        self.model, self.spec, self.config, self.encoding = model, spec, config, load_tokenizer(spec)
        self.base = base
        self.stop_ids = stop_ids(spec, self.encoding)
        self.sparse = not config.dense and any(bool(layer.theta.any()) for _, layer in model.sparse_layers())
        self.decoder, self.engine, self.no_kernel = make_decoder(model, config, dense=not self.sparse)
        self.dense_decoder = None       # made by the first dense()
        self.reset()

    def reset(self):
        """Forgets everything, the random numbers included."""
        self.turns, self.tokens = [], []
        self.logits = None      # of the pass over the last token; None: read them all again
        self.generator = torch.Generator().manual_seed(self.config.seed)

    @property
    def has_template(self):
        return 'template' in self.spec and not self.config.turn_template

    @property
    def can_go_on(self):
        """Whether the model has something to say when nothing is typed."""
        return bool(self.tokens) and not (self.has_template and self.tokens[-1] in self.stop_ids)

    def encode(self, typed):
        """The ids that a turn adds to the text so far. If nothing was typed, the model goes on from there."""
        if not typed:
            return []
        if not self.has_template:
            text = unescape(self.config.turn_template or '{prompt}').replace('{prompt}', typed)
            ended = not self.tokens or self.tokens[-1] in self.stop_ids
            if not ended and not self.encoding.decode_single_token_bytes(self.tokens[-1]).endswith(b'\n'):
                text = '\n' + text
            return (bos_ids(self.spec) if ended else []) + self.encoding.encode_ordinary(text)
        if not self.tokens:
            system = [('system', self.config.system)] if self.config.system else []
            return dialogue_ids(self.spec, self.encoding, [*system, ('user', typed)])
        # the end of the reply's message comes first; the model may have said its first token already
        opening = dialogue_ids(self.spec, self.encoding, [], begin=False)
        messages = [('assistant', ''), ('user', typed)]
        new = dialogue_ids(self.spec, self.encoding, messages, begin=False)[len(opening):]
        return new[self.tokens[-1] == new[0]:]

    def say(self, typed, show):
        """Adds a turn, and returns it."""
        turn = Turn(typed, self.tokens, self.encode(typed), self.generator.get_state(), self.decoder,
                    self.engine)
        logits, self.logits = self.logits, None
        stream = StreamDecoder([unescape(stop) for stop in self.config.stop.split('|') if stop])
        try:
            logits = self.read(turn, logits, show)
            while turn.ended == 'length' and len(turn.reply) < self.config.max_tokens:
                logits = self.add_token(turn, logits)
                turn.emit('reply', stream.feed(turn.reply[-1]), show)
                if stream.stopped:
                    turn.ended = 'stop'
                elif turn.reply[-1].id in self.stop_ids:
                    turn.ended = 'end'
            self.logits = logits
        except KeyboardInterrupt:
            turn.ended = 'interrupt'
        turn.emit('reply', stream.end(), show)
        said = [token.id for token in turn.reply]
        if turn.ended == 'stop':        # perhaps in the middle of a token: encode the text before it again
            said, self.logits = self.encoding.encode_ordinary(turn.text), None
        # a prompt interrupted before its reply began is dropped: it may be long, and was a mistake
        dropped = turn.ended == 'interrupt' and not said
        self.tokens = turn.before if dropped else turn.before + turn.new + said
        self.turns.append(turn)
        return turn

    def read(self, turn, logits, show):
        """
        Reads the turn's prompt. logits: those after the text before it, or None if the decoder must read that
        text too. Returns the logits after the prompt.
        """
        start = time.perf_counter()
        if logits is None:
            logits, passes = self.decoder.prefill(turn.before + turn.new)
        else:
            passes = []
            for id in turn.new:
                logits, active = self.decoder.step(id)
                passes.append(active)
        turn.seconds.append(time.perf_counter() - start)
        # paired from the end: of a long prompt only that fits the context, and text before it is not shown
        turn.prompt = [self.token(id, active) for id, active in zip(turn.new[::-1], passes[::-1])][::-1]
        stream = StreamDecoder()
        chars = [char for token in turn.prompt for char in stream.feed(token)]
        if self.has_template and turn.new:      # show what was typed without the template around it
            typed = turn.typed.strip()
            begin = ''.join(char for char, _ in chars).rfind(typed)
            chars = (chars if begin < 0 else chars[begin:begin + len(typed)]) + [('\n', None)]
        turn.emit('prompt', chars, show)
        return logits

    def add_token(self, turn, logits):
        """Draws a token and reads it, so that its own pass can colour it. Returns the logits after it."""
        start = time.perf_counter()
        said = torch.tensor([[token.id for token in turn.reply[-REPEAT_WINDOW:]]], dtype=torch.long)
        ids, probability = sample(torch.from_numpy(logits[None, :self.encoding.n_vocab]),
                                  torch.rand(1, generator=self.generator), said=said,
                                  **{name: getattr(self.config, name) for name in SAMPLING})
        logits, active = self.decoder.step(int(ids))
        turn.seconds.append(time.perf_counter() - start)
        turn.reply.append(self.token(int(ids), active, float(probability)))
        return logits

    def token(self, id, active, probability=None):
        share = float(active.sum() / self.decoder.n_weights.sum())
        piece, special = self.encoding.decode_single_token_bytes(id), self.encoding.is_special_token(id)
        return Token(id, piece, special, active, share, probability)

    def retry(self, show):
        """The last turn once more, with other random numbers."""
        turn = self.turns.pop()
        self.tokens, self.logits = turn.before, None
        return self.say(turn.typed, show)

    def dense(self, show):
        """The last turn once more, with every weight and the same random numbers. It is not kept."""
        if self.dense_decoder is None:
            model = weights.load(self.base)[0] if self.base else self.model
            self.dense_decoder = make_decoder(model, self.config, dense=True)[0]
        turn, other = self.turns[-1], copy(self)
        other.decoder, other.generator = self.dense_decoder, torch.Generator()
        other.generator.set_state(turn.random_state)
        other.tokens, other.turns, other.logits = turn.before, [], None
        return other.say(turn.typed, show)
