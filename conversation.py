"""
A conversation with a CWIC model: what is said, what it cost, and nothing of how that is shown, which is chat.py's and
render.py's.

    conversation = Conversation(model, encoding, ChatConfig(max_tokens=100))
    turn = conversation.say('def fibonacci(n):', show=lambda kind, text, token: print(text, end=''), interrupted=lambda: False)
    turn.reply[0].active            # the weights that each matrix used to predict the first token

A token's compute is that of the pass which predicted it: the pass over the token before it, counted in that same pass, never
in a second one. The first token of all was predicted by nothing.

Between turns the keys and values of the text so far are kept, and only what is new is read, token by token; where that is
much, or the text was changed (a retry, a stop sequence cut off), all that fits the context is read again. Once the text is
longer than the context these differ in how much of it the model still sees: the decoder drops half a window at a time.

But: one sequence at a time, no system prompts, no tool calls, no saving and reloading of conversations.
"""

import codecs
import json
import time
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from build_kernel import KernelUnavailable
from cwic import dense_copy
from decoder import Decoder, TorchDecoder

FEW = 64                # new tokens up to this number are read one by one, through the kernel; more, in one pass with all others


def unescape(text):
    return text.replace('\\n', '\n').replace('\\t', '\t')


def stops(config):
    """The stop sequences of a ChatConfig, as they occur in text."""
    return [unescape(text) for text in config.stop.split('|') if text]


# -----------------------------------------------------------------------------
# decoding


@dataclass
class Token:
    """A token of the text. active: np.int64 (M), the weights used to predict it, each matrix's; None where nothing did."""
    id: int
    piece: bytes            # its part of the text; not always whole characters
    active: np.ndarray
    share: float            # active weights / dense weights; None where nothing predicted it
    probability: float = None       # that the model gave it, before temperature and the like; None for what was typed

    @property
    def reduction(self):
        return 1 / self.share if self.share else float('inf')


@dataclass
class Turn:
    """What was typed and what the model said to it."""
    typed: str
    before: list            # ids of the text so far
    config: object          # the chat.ChatConfig of the time
    state: dict             # of the random numbers, before the first was drawn
    dense: np.ndarray       # np.int64 (M), weights of each matrix
    engine: str
    prompt: list = field(default_factory=list)      # of Token
    reply: list = field(default_factory=list)       # of Token, also those of a stop sequence, which are not shown
    shown: list = field(default_factory=list)       # ('prompt' or 'reply', text, Token): each character once, in order
    ended: str = 'length'   # or 'stop', 'endoftext', 'interrupt'
    first_seconds: float = 0.0      # from the start until there was a first token: reading the prompt, mostly
    seconds: float = 0.0            # for all the others

    @property
    def text(self):
        return ''.join(text for kind, text, _ in self.shown if kind == 'reply')

    def share(self):
        """Mean active weights / dense weights of the reply's tokens."""
        return float(np.mean([token.share for token in self.reply]))

    def speed(self):
        """Tokens per second after the first; None where none came after it."""
        return (len(self.reply) - 1) / self.seconds if len(self.reply) > 1 else None

    def summary(self):
        """The quiet line after a reply."""
        if not self.reply:
            return f'0 tokens; {self.engine}'
        speed = f', {self.speed():.0f}/s' if len(self.reply) > 1 else ''
        return (f'{len(self.reply)} tokens{speed}, first {1000 * self.first_seconds:.0f} ms; '
                f'reduction {1 / self.share():.2f} ({100 * self.share():.1f}% of dense); {self.engine}')

    def to_json(self, names):
        """One line of JSON; names: of the M matrices."""
        return json.dumps(dict(
            prompt=self.typed, text=self.text, ended=self.ended, tokens=[token.id for token in self.reply],
            probabilities=[token.probability for token in self.reply], matrices=names, dense=self.dense.tolist(),
            active=[token.active.tolist() for token in self.reply],             # [token][matrix]
            reduction=1 / self.share() if self.reply else None, share_of_dense=self.share() if self.reply else None,
            first_token_seconds=self.first_seconds, other_tokens_seconds=self.seconds, tokens_per_second=self.speed(),
            engine=self.engine), ensure_ascii=False)


def choose(logits, config, rng):
    """
    logits (vocab) -> (token id, its probability under the model). Draws one random number each time, needed or not: so
    two models that are fed the same numbers can be compared token by token.
    """
    logits = logits.astype(np.float64) - logits.max()
    p = np.exp(logits) / np.exp(logits).sum()                       # (vocab,)
    point = rng.random()
    if config.temperature == 0:
        token = int(p.argmax())
    else:
        order = np.argsort(-logits, kind='stable')[:config.top_k or None]
        mass = np.cumsum(np.exp(logits[order] / config.temperature))
        kept = mass[:np.searchsorted(mass, config.top_p * mass[-1]) + 1]    # the fewest that hold top_p of it
        token = int(order[min(np.searchsorted(kept, point * kept[-1], side='right'), len(kept) - 1)])
    return token, float(p[token])


class Speller:
    """
    Makes text of tokens: a character once all its bytes are there, with the token that completes it; and nothing that may
    turn out to be the beginning of a stop sequence. What it gives is a list of (text, token).
    """

    def __init__(self, stops=()):
        self.utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        self.stops, self.held, self.last, self.stopped = stops, [], None, False

    def feed(self, token):
        self.last = token
        self.held += [(char, token) for char in self.utf8.decode(token.piece)]
        text = ''.join(char for char, _ in self.held)
        found = [text.index(stop) for stop in self.stops if stop in text]
        if found:
            ready, self.stopped = self.release(min(found)), True
            self.held = []
            return ready
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return self.release(len(text) - max(begun, default=0))

    def end(self):
        """Whatever was held back; of half a character, what stands for it."""
        self.held += [(char, self.last) for char in self.utf8.decode(b'', final=True)]
        return self.release(len(self.held))

    def release(self, count):
        ready, self.held = self.held[:count], self.held[count:]
        runs = [list(run) for _, run in groupby(ready, key=lambda pair: id(pair[1]))]
        return [(''.join(char for char, _ in run), run[0][1]) for run in runs]


def reply(decoder, encoding, turn, new, known, rng, show, interrupted):
    """
    Fills a turn: reads turn.before and new, lists of ids of which the decoder has read the first `known`, and continues.
    show(kind, text, token) is called with all that is to be seen, as it comes; interrupted() says whether to stop.
    """
    def token(id, active, probability=None):
        share = None if active is None else float(active.sum() / turn.dense.sum())
        return Token(id, encoding.decode_single_token_bytes(id), active, share, probability)

    def tell(kind, pieces):
        for text, token in pieces:
            turn.shown.append((kind, text, token))
            show(kind, text, token)

    tokens = turn.before + new
    start = time.perf_counter()
    if known and 0 < len(tokens) - known <= FEW:
        passes = [decoder.step(id) for id in tokens[known:]]
        logits, rows = passes[-1][0], [active for _, active in passes]
    else:
        logits, rows = decoder.prefill(tokens)
    turn.first_seconds = time.perf_counter() - start

    rows = [None] * (len(tokens) - len(rows)) + list(rows)      # of the pass over each token, which predicts the one after it
    speller = Speller()
    for i in range(len(turn.before), len(tokens)):
        turn.prompt.append(token(tokens[i], rows[i - 1] if i else None))
        tell('prompt', speller.feed(turn.prompt[-1]))

    active, speller = rows[-1], Speller(stops(turn.config))
    for i in range(turn.config.max_tokens):
        if interrupted():
            turn.ended = 'interrupt'
            break
        start = time.perf_counter()
        if i:
            logits, active = decoder.step(turn.reply[-1].id)
        id, probability = choose(logits[:encoding.n_vocab], turn.config, rng)
        spent = time.perf_counter() - start
        turn.first_seconds, turn.seconds = turn.first_seconds + (0 if i else spent), turn.seconds + (spent if i else 0)
        turn.reply.append(token(id, active, probability))
        if id == encoding.eot_token:
            turn.ended = 'endoftext'
            break
        tell('reply', speller.feed(turn.reply[-1]))
        if speller.stopped:
            turn.ended = 'stop'
            return
    tell('reply', speller.end())


def make_decoder(model, config):
    """-> a decoder, what it is in a few words, and why it is not the kernel's, or None. Raises ValueError for bad options."""
    try:
        decoder = Decoder(model, config.dtype, config.threads)
    except KernelUnavailable as error:
        return TorchDecoder(model), 'f32, PyTorch', str(error)
    return decoder, f'{config.dtype}, {decoder.threads} thread{"s" * (decoder.threads > 1)}', None


# -----------------------------------------------------------------------------
# a conversation


class Conversation:
    """The text so far, as token ids, and the turns it is made of. config may be replaced between turns."""

    def __init__(self, model, encoding, config):
        self.model, self.encoding, self.config = model, encoding, config
        self.decoder, self.engine, self.no_kernel = make_decoder(model, config)
        self.dense_decoder = None       # made when it is first asked for
        self.reset()

    def reset(self):
        """Forgets everything, the random numbers included."""
        self.turns, self.tokens, self.known = [], [], 0         # known: how many of the tokens the decoder has read
        self.rng = np.random.default_rng(self.config.seed)

    def encode(self, typed):
        """The ids that a turn adds to the text so far. Nothing typed adds nothing: the model goes on."""
        if not typed:
            return []
        template = unescape(self.config.turn_template)
        text = template.replace('{prompt}', typed) if template else typed
        ended = not self.tokens or self.tokens[-1] == self.encoding.eot_token
        if not ended and not self.encoding.decode_single_token_bytes(self.tokens[-1]).endswith(b'\n'):
            text = '\n' + text
        return self.encoding.encode_ordinary(text)

    def turn(self, typed, before):
        return Turn(typed, before, self.config, self.rng.bit_generator.state, self.decoder.dense, self.engine)

    def say(self, typed, show, interrupted):
        """Adds a turn, and returns it. show, interrupted: see reply()."""
        turn, new = self.turn(typed, self.tokens), self.encode(typed)
        reply(self.decoder, self.encoding, turn, new, self.known, self.rng, show, interrupted)
        said = [token.id for token in turn.reply]
        # the last token has not been read yet, as nothing after it was asked for
        self.tokens, self.known = turn.before + new + said, len(turn.before) + len(new) + max(len(said) - 1, 0)
        if turn.ended == 'stop':
            self.tokens, self.known = turn.before + new + self.without_stop(turn), 0
        self.turns.append(turn)
        return turn

    def without_stop(self, turn):
        """The ids of a reply less its stop sequence, which may begin and end within a token."""
        said, kept = b''.join(token.piece for token in turn.reply), []
        left = min(said.index(stop) for stop in (text.encode() for text in stops(turn.config)) if stop in said)
        for token in turn.reply:
            if len(token.piece) > left:
                return kept + self.encoding.encode_ordinary(token.piece[:left].decode('utf-8', 'replace'))
            kept.append(token.id)
            left -= len(token.piece)

    def retry(self, show, interrupted):
        """The last turn once more, with other random numbers."""
        turn = self.turns.pop()
        self.tokens, self.known = turn.before, 0
        return self.say(turn.typed, show, interrupted)

    def dense(self, show, interrupted):
        """The last turn once more with every weight, thresholds at 0, and the same random numbers. It is not kept."""
        if self.dense_decoder is None:
            model = dense_copy(self.model)
            for _, linear in model.linears():
                linear.theta.zero_()
            self.dense_decoder = make_decoder(model, self.config)[0]
        last, rng = self.turns[-1], np.random.default_rng()
        rng.bit_generator.state = last.state
        turn = replace(last, prompt=[], reply=[], shown=[], ended='length', first_seconds=0.0, seconds=0.0)
        reply(self.dense_decoder, self.encoding, turn, [token.id for token in last.prompt], 0, rng, show, interrupted)
        return turn
