"""
A conversation with a CWIC model: what is said, and what it costs. How it looks is render.py's.

    conversation = Conversation(model, saved['tokenizer'], ChatConfig(max_tokens=100))
    turn = conversation.say('Why is the sky blue?', show=lambda kind, text, token: print(text, end=''))
    turn.reply[0].active        # the weights that each matrix used in the pass over the reply's first token

A pass over a token reads it and predicts the next one. Its compute is counted in that same pass, never in a
second one, and belongs to the token it reads; or, with color_by = 'predicted', to the token it predicts.

Models whose tokenizer brings a chat template are spoken to in it; all others continue the text so far.

Not here: tools, several conversations at once, saving and reloading. Where the text outgrows the context, the
decoder forgets the older half of what it sees, the system prompt included.
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
from cwic import REPEAT_WINDOW, sample
from decoder import Decoder, TorchDecoder
from options import SAMPLING
from tokenizer import bos_ids, dialogue_ids, load_tokenizer, stop_ids

LARGE = 20_000_000      # weights from which --dtype auto takes int8


@dataclass
class Token:
    id: int
    piece: bytes            # as the tokenizer spells it; not always whole characters
    special: bool           # not text: it ends a message, for example
    active: np.ndarray      # np.int64 (M), the weights each matrix used; None for a token that none predicted
    share: float            # active weights / dense weights, or None
    probability: float      # under the model, before penalty and temperature; None for what was typed


@dataclass
class Turn:
    """What was typed and what the model said to it."""
    typed: str
    before: list            # ids of the text so far
    new: list               # ids that what was typed became
    config: object          # the chat.ChatConfig of the time
    random_state: object    # of the generator, before the first number was drawn
    decoder: object         # that made the reply; its .names and .n_weights (M) go with every active count
    engine: str             # what that is, in a few words
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
        """Tokens per second after the first; None where none came after it."""
        return (len(self.reply) - 1) / sum(self.seconds[2:]) if len(self.reply) > 1 else None

    def tell(self, kind, chars, show):
        """chars: [(character, Token)], of which those of one token are shown together."""
        for _, run in groupby(chars, key=lambda pair: id(pair[1])):
            texts, tokens = zip(*run)
            self.shown.append((kind, ''.join(texts), tokens[0]))
            show(*self.shown[-1])


class Speller:
    """
    Makes text of tokens: a character once all its bytes are there, with the token that completes it; and
    nothing that may yet become a stop sequence. What it gives is a list of (character, token).
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
        """Whatever was held back, but a stop sequence; of half a character, what stands for it."""
        rest = self.held + [(char, self.last) for char in self.utf8.decode(b'', final=True)]
        return [] if self.stopped else rest


# -----------------------------------------------------------------------------


def make_decoder(model, config, dense):
    """-> a decoder, what it is in a few words, and why it is not the kernel's, or None. Raises ValueError."""
    dtype = config.dtype if config.dtype != 'auto' else 'int8' if model.n_weights() > LARGE else 'f32'
    try:
        decoder = Decoder(model, dtype, config.threads, dense)
    except KernelUnavailable as error:
        return TorchDecoder(model, dense), 'f32, PyTorch', str(error)
    return decoder, f'{dtype}, {decoder.threads} thread{"s" * (decoder.threads > 1)}', None


def unescape(text):
    return text.replace('\\n', '\n').replace('\\t', '\t')


class Conversation:
    """
    The text so far, as token ids, and the turns it is made of. config may be replaced between turns.
    show(kind, text, token) is called with what is to be seen, as it comes. KeyboardInterrupt ends a reply.
    base: of an adapter, what weights.load takes for the dense model that it changes.
    """

    def __init__(self, model, spec, config, base=None):
        self.model, self.spec, self.config, self.encoding = model, spec, config, load_tokenizer(spec)
        self.base = base
        self.stop_ids = stop_ids(spec, self.encoding)
        self.sparse = not config.dense and any(bool(layer.theta.any()) for _, layer in model.sparse_layers())
        self.decoder, self.engine, self.no_kernel = make_decoder(model, config, dense=not self.sparse)
        self.dense_decoder = None       # made when it is first asked for
        self.reset()

    def reset(self):
        """Forgets everything, the random numbers included."""
        self.turns, self.tokens = [], []
        self.last = None        # logits, active of the pass over the last of tokens; None: all is read again
        self.generator = torch.Generator().manual_seed(self.config.seed)

    @property
    def has_template(self):
        return 'template' in self.spec and not self.config.turn_template

    @property
    def can_go_on(self):
        """Whether the model has something to say when nothing is typed."""
        return bool(self.tokens) and not (self.has_template and self.tokens[-1] in self.stop_ids)

    def encode(self, typed):
        """The ids that a turn adds to the text so far. Nothing typed adds nothing: the model goes on."""
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
        # the rest of the last reply's message, of which the model may have said the first token itself
        opening = dialogue_ids(self.spec, self.encoding, [], begin=False)
        messages = [('assistant', ''), ('user', typed)]
        new = dialogue_ids(self.spec, self.encoding, messages, begin=False)[len(opening):]
        return new[self.tokens[-1] == new[0]:]

    def say(self, typed, show):
        """Adds a turn, and returns it."""
        turn = Turn(typed, self.tokens, self.encode(typed), self.config, self.generator.get_state(),
                    self.decoder, self.engine)
        last, self.last = self.last, None
        speller = Speller([unescape(stop) for stop in self.config.stop.split('|') if stop])
        try:
            last = self.read(turn, last, show)
            while turn.ended == 'length' and len(turn.reply) < self.config.max_tokens:
                last = self.add_token(turn, *last)
                turn.tell('reply', speller.feed(turn.reply[-1]), show)
                if speller.stopped or turn.reply[-1].id in self.stop_ids:
                    turn.ended = 'stop' if speller.stopped else 'end'
            self.last = last
        except KeyboardInterrupt:
            turn.ended = 'interrupt'
        turn.tell('reply', speller.end(), show)
        said = [token.id for token in turn.reply]
        if turn.ended == 'stop':        # which may be within a token: what stood before it is encoded again
            said, self.last = self.encoding.encode_ordinary(turn.text), None
        self.tokens = turn.before + turn.new + said
        self.turns.append(turn)
        return turn

    def read(self, turn, last, show):
        """
        Reads the turn's prompt; last: logits, active of the pass over the token before it, or None where the
        decoder has not read that. Returns the same of the last pass.
        """
        start = time.perf_counter()
        if last:
            passes = [last] + [self.decoder.step(id) for id in turn.new]
            logits, actives = passes[-1][0], [active for _, active in passes]
        else:
            logits, actives = self.decoder.prefill(turn.before + turn.new)
        turn.seconds.append(time.perf_counter() - start)
        speller, chars, actives = Speller(), [], [None, *actives]       # of the latest passes
        for back in range(min(len(turn.new), len(actives) - 1), 0, -1):
            turn.prompt.append(self.token(turn.new[-back], actives[-back], actives[-back - 1], None))
            chars += speller.feed(turn.prompt[-1])
        if self.has_template and turn.new:      # show what was typed, without the template around it
            typed = turn.typed.strip()
            begin = ''.join(char for char, _ in chars).rfind(typed)
            chars = (chars if begin < 0 else chars[begin:begin + len(typed)]) + [('\n', None)]
        turn.tell('prompt', chars, show)
        return logits, actives[-1]

    def add_token(self, turn, logits, predicted):
        """Draws a token and reads it: it is shown when the pass over it is done. -> the same as read()."""
        start = time.perf_counter()
        said = torch.tensor([[token.id for token in turn.reply[-REPEAT_WINDOW:]]], dtype=torch.long)
        ids, probability = sample(torch.from_numpy(logits[None, :self.encoding.n_vocab]),
                                  torch.rand(1, generator=self.generator), said=said,
                                  **{name: getattr(self.config, name) for name in SAMPLING})
        logits, active = self.decoder.step(int(ids))
        turn.seconds.append(time.perf_counter() - start)
        turn.reply.append(self.token(int(ids), active, predicted, float(probability)))
        return logits, active

    def token(self, id, read, predicted, probability):
        """read, predicted: the counts of the pass over it, and of the one before."""
        active = read if self.config.color_by == 'read' else predicted
        share = None if active is None else float(active.sum() / self.decoder.n_weights.sum())
        piece, special = self.encoding.decode_single_token_bytes(id), self.encoding.is_special_token(id)
        return Token(id, piece, special, active, share, probability)

    def retry(self, show):
        """The last turn once more, with other random numbers."""
        turn = self.turns.pop()
        self.tokens, self.last = turn.before, None
        return self.say(turn.typed, show)

    def dense(self, show):
        """The last turn once more with every weight, and the same random numbers. It is not kept."""
        if self.dense_decoder is None:
            model = weights.load(self.base)[0] if self.base else self.model
            self.dense_decoder = make_decoder(model, self.config, dense=True)[0]
        turn, other = self.turns[-1], copy(self)
        other.config, other.decoder, other.generator = turn.config, self.dense_decoder, torch.Generator()
        other.generator.set_state(turn.random_state)
        other.tokens, other.turns, other.last = turn.before, [], None
        return other.say(turn.typed, show)
