"""
chat.py, conversation.py and render.py: what a terminal shows, against a small terminal written here; what is
counted, against cwic.generate(); and the program itself, in pipes and in a pseudo-terminal.
"""

import fcntl
import html
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import linux_only
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import build_kernel
import chat
import cwic
import plots
import render
from checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from conversation import Conversation, StreamDecoder, Token
from tokenizer import PATTERNS, bpe_spec, dialogue_ids, load_tokenizer, stop_ids, tokenizer_spec

# -----------------------------------------------------------------------------
# a terminal


class Screen:
    """
    As much of a terminal as our output needs: colours, newlines, wrapping at the right margin, wide
    characters, scrolling. As xterm does, it fills lines that scroll into view with the current background.
    cells: lines of [character, background]; the background is None, or an index of 256.
    """

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.back, self.x, self.y, self.cells = None, 0, 0, []
        self.cells = [self.blank() for _ in range(rows)]
        self.gone = []          # lines that have scrolled out at the top

    def blank(self):
        return [[' ', self.back] for _ in range(self.columns)]

    def down(self):
        self.x = 0
        if self.y + 1 < self.rows:
            self.y += 1
        else:
            self.gone.append(self.cells.pop(0))
            self.cells.append(self.blank())

    def feed(self, text):
        for code, char in re.findall(r'(\x1b\[[0-9;]*[A-Za-z])|([\s\S])', text):
            if code:
                self.control(code)
            elif char == '\n':
                self.down()
            elif char != '\r':
                assert char >= ' ', f'a control character reached the terminal: {char!r}'
                self.put(char)

    def control(self, code):
        if code == '\x1b[K':        # from options.progress(), on a line that is empty
            return
        assert code[-1] == 'm', f'unexpected {code!r}'
        numbers = [int(n or 0) for n in code[2:-1].split(';')]
        if numbers[0] == 0:
            self.back = None
        elif numbers[0] == 38:
            assert [numbers[i] for i in (1, 3, 4)] == [5, 48, 5]
            self.back = numbers[5]
        else:
            assert numbers == [2]

    def put(self, char):
        width = 2 if unicodedata.east_asian_width(char) in 'WF' else 0 if unicodedata.combining(char) else 1
        if width == 0:
            self.cells[self.y][self.x - 1][0] += char
            return
        if self.x + width > self.columns:
            self.down()
        for x in range(self.x, self.x + width):
            self.cells[self.y][x] = [char if x == self.x else '', self.back]
        self.x += width

    def lines(self):
        return self.gone + self.cells


def drawn(pieces, columns, rows=3):
    """[(text, share)] painted on a Screen -> the Screen and the palette."""
    screen, palette = Screen(columns, rows), render.Palette(0.2, 0.8)
    out = io.StringIO()
    painter = render.Painter(out, palette, lambda: columns)
    for text, share in pieces:
        out.seek(0), out.truncate()
        painter.write(text, share)
        screen.feed(out.getvalue())
        assert screen.back is None, 'a colour outlived its piece: an interrupt here would leave it on'
    return screen, palette


def background(palette, share):
    """The background that a terminal shows for a share: an index of 256, or None."""
    return None if share is None else int(re.search(r'48;5;(\d+)', palette.paint('x', share))[1])


PIECES = [('def', None), (' f(é', 0.25), ('日本語', 0.7), (')\n    ', 0.4), ('\tx', 0.6),
          ('e\u0301=🎉🎉', 0.3), ('\n\n', 0.8), ('wrap ' * 9, 0.5), ('\n', 0.2), ('12345', 0.3),
          ('67890', 0.7), ('!', 0.2), (' word', 0.6), (' word', 0.4)]


@pytest.mark.parametrize('columns', [10, 11, 80])
def test_painter_colors_each_character_and_nothing_else(columns):
    """
    A terminal that scrolls as a line wraps fills the new line with the current background: a coloured reply
    left bars to the right margin. And a tab leaves the cells it skips unpainted.
    """
    screen, palette = drawn(PIECES, columns)
    # the same text laid out by hand: a list of lines of [character, background]
    want, line = [], []
    for piece, share in PIECES:
        back = background(palette, share)
        for word in re.findall(' ?[^ \n]+|[ \n]', piece.replace('\t', '    ')):
            length = sum(2 if unicodedata.east_asian_width(char) == 'W' else char != '\u0301' for char in word)
            if word[0] == ' ' and len(line) + length > columns - 2:
                word = '\n' + word[1:]
            for char in word:
                if char == '\u0301':
                    line[-1][0] += char
                    continue
                cells = [[char, back]] + [['', back]] * (unicodedata.east_asian_width(char) == 'W')
                if char == '\n' or len(line) + len(cells) > columns:
                    want.append(line)
                    line = []
                line += cells if char != '\n' else []
    want.append(line)
    want = [line + [[' ', None]] * (columns - len(line)) for line in want]
    got = screen.lines()
    assert got[:len(want)] == want
    assert all(cell == [' ', None] for line in got[len(want):] for cell in line)


def test_control_characters_in_a_reply_do_not_reach_the_terminal():
    """
    Escape codes in a reply were obeyed: a model that had seen colour codes in its text could clear the
    screen. And a U+202E, which is no control character, turned the rest of the line round.
    """
    screen, _ = drawn([('a\x1b[2J\x07\r\x7f\x9b1mb\u202ec\u2066', 0.5)], 40)
    shown = ''.join(char for char, _ in screen.lines()[0]).rstrip()
    assert shown == 'a\ufffd[2J' + 4 * '\ufffd' + '1mb\ufffdc\ufffd'


def test_without_colors_there_are_no_escape_codes():
    out = io.StringIO()
    painter = render.Painter(out, render.Palette(0, 1, colored=False), lambda: 4)
    painter.write('plain\ttext\n日本語', 0.5)
    painter.end_line()
    assert '\x1b' not in out.getvalue()


def luminance(rgb):
    """Relative luminance, from 0 to 1, as contrast is defined on (WCAG 2)."""
    linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def lightness(rgb):
    """CIE 1976 L*, from 0 to 100."""
    y = luminance(rgb)
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def xterm(index):
    """The colour that a terminal shows for an index from 16 to 255."""
    if index >= 232:
        return (8 + 10 * (index - 232),) * 3
    cube = (index - 16) // 36, (index - 16) // 6 % 6, (index - 16) % 6
    return tuple(0 if v == 0 else 55 + 40 * v for v in cube)


def test_the_scale_grows_darker_evenly_and_text_stays_readable():
    """
    Lightness, measured in another space than the scale was made in, falls all the way, by steps within a
    third of the mean; and text has a contrast of at least 4.5, on pages and on a terminal.
    """
    scale = [plots.scale_color(i / 20) for i in range(21)]
    steps = -np.diff([lightness(color) for color in scale])
    assert (steps > 0).all() and steps.max() < 1.34 * steps.mean() and steps.min() > 0.66 * steps.mean()
    pairs = [(plots.text_color(color), color) for color in scale]
    codes = [render.Palette(0, 1).paint('x', i / 20) for i in range(21)]
    coarse = [[xterm(int(n)) for n in re.search(r'38;5;(\d+);48;5;(\d+)', code).groups()] for code in codes]
    steps = [luminance(xterm(index)) for index in render.RAMP_256]
    assert (np.diff(steps) < 0).all() and len({back for _, back in coarse}) == len(steps)
    assert [luminance(back) for _, back in coarse] == sorted((luminance(back) for _, back in coarse), reverse=True)
    for text, back in pairs + coarse:
        light, dark = sorted((luminance(text), luminance(back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


# -----------------------------------------------------------------------------
# text from tokens


def stream(pieces, stops=()):
    """-> [(text, token id)] as it is shown, and whether a stop sequence was found"""
    decoder = StreamDecoder(stops)
    tokens = [Token(i, piece, False, None, None, None) for i, piece in enumerate(pieces)]
    shown = []
    for token in tokens:
        shown += decoder.feed(token)
        if decoder.stopped:
            break
    chars = [(char, token.id) for char, token in shown + decoder.end()]
    return [(''.join(char for char, _ in run), id) for id, run in
            ((id, list(run)) for id, run in groupby(chars, key=lambda pair: pair[1]))], decoder.stopped


def test_a_character_split_over_tokens_is_shown_whole_at_the_last():
    """Tokens printed one at a time through decode() broke every character that two of them share."""
    party = '🎉'.encode()
    assert stream([b'a', party[:1], party[1:3], party[3:] + b'b']) == ([('a', 0), ('🎉b', 3)], False)
    assert stream([b'a' + party[:2]]) == ([('a\ufffd', 0)], False)
    assert stream([party[:2], b'b']) == ([('\ufffdb', 1)], False)
    assert stream([]) == ([], False)


def test_a_stop_sequence_split_over_tokens_is_not_shown():
    text = 'yes.\nUser: no'
    for cut in range(1, len(text)):
        for second in range(cut, len(text)):
            pieces = [part.encode() for part in (text[:cut], text[cut:second], text[second:])]
            shown, stopped = stream(pieces, ['\nUser:', 'never'])
            assert ''.join(piece for piece, _ in shown) == 'yes.' and stopped
    # what only begins like one is held back, but not lost
    assert stream([b'a\nUs', b'e', b'd'], ['\nUser:']) == ([('a\nUs', 0), ('e', 1), ('d', 2)], False)
    assert stream([b'a\nUs'], ['\nUser:']) == ([('a\nUs', 0)], False)


# -----------------------------------------------------------------------------
# conversations, on a small random model that speaks in bytes: nearly every character is split


def make_checkpoint(path, spec, vocab_size, **sizes):
    torch.manual_seed(3)
    model = cwic.GPT(cwic.CWICConfig(
        vocab_size=vocab_size, block_size=48, n_layer=2, n_head=2, n_embd=32, stripe_qkv=32, stripe_out=20,
        stripe_up=48, stripe_down=32, stripe_head=100, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        model.observe(torch.randint(vocab_size, (8, 48)))
        for _, layer in model.sparse_layers():
            layer.theta.copy_(torch.rand(layer.theta.shape) * 1.5 / layer.scale)
        for id in stop_ids(spec, load_tokenizer(spec)):
            model.head.weight[:, id] = -10 * model.head.mu        # never says it
        shares = model.eval()(torch.randint(vocab_size, (4, 48)))[1].sum(0) / model.n_weights()
    percentiles = {str(p): float(np.percentile(shares, p)) for p in (5, 50, 95)}
    save_checkpoint(path, model, tokenizer=spec, val_loss=5.5, reduction=float(1 / shares.mean()),
                    compute_percentiles=percentiles)
    return str(path)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp('chat') / 'tiny.safetensors', tokenizer_spec('bytes'), 257)


TEMPLATE = dict(begin='', message='<|im_start|>{role}\n{text}<|im_end|>\n', prefix='', system='Be kind',
                strip=False, stop=['<|im_end|>'])
CHAT_SPEC = bpe_spec('tiny', PATTERNS['gpt2'], [bytes([b]) for b in range(256)], end='<|endoftext|>',
                     special={'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}, template=TEMPLATE)


@pytest.fixture
def conversation(checkpoint):
    model, saved = load_checkpoint(checkpoint)
    return Conversation(model, saved['tokenizer'], chat.ChatConfig(max_tokens=20, threads=1))


@pytest.fixture(scope='module')
def chat_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('chat') / 'chat.safetensors'
    return make_checkpoint(path, CHAT_SPEC, 259, arch='llama', n_kv_head=1)


@pytest.fixture
def dialogue(chat_checkpoint):
    model, saved = load_checkpoint(chat_checkpoint)
    return Conversation(model, saved['tokenizer'], chat.ChatConfig(max_tokens=20, threads=1))


def silent(*_):
    pass


def say_this(monkeypatch, tokens):
    """The model says these tokens, whatever it thinks of them."""
    drawn = ((torch.tensor([id]), torch.tensor([0.25])) for id in tokens)
    monkeypatch.setattr('conversation.sample', lambda *_, **__: next(drawn))


def test_compute_of_each_token_matches_generate(conversation):
    """
    Compute was counted by a second forward after generation, which cost as much again and saw another context.
    And it was shown at the token that was predicted, although it follows the surprise of the token that is read.
    """
    conversation.config = chat.ChatConfig(temperature=0, repeat_penalty=1, max_tokens=100, threads=1)
    turn = conversation.say('Kraków 日本', silent)       # and 100 tokens: the context, of 48, slides twice
    prompt = list('Kraków 日本'.encode())
    want = list(cwic.generate(conversation.model, prompt, 101))         # each with the pass that predicted it
    assert [token.id for token in turn.reply] == [token for token, _ in want[:100]]
    for token, (_, active) in zip(turn.reply, want[1:]):
        assert token.active.tolist() == active.tolist()
        assert token.share == pytest.approx(active.sum().item() / conversation.model.n_weights())
    logits, active = conversation.model(torch.tensor([prompt]))         # active (M, 1, T)
    assert [token.active.tolist() for token in turn.prompt] == active[:, 0].t().tolist()
    assert turn.reply[0].probability == pytest.approx(logits[0, -1].softmax(-1).max().item(), rel=1e-3)


def test_split_and_wide_characters_get_the_colors_of_their_tokens(conversation):
    """Every character, prompt and reply, stands on the colour of the token that completed it."""
    conversation.config.max_tokens = 40
    screen, palette, out = Screen(16, 30), render.Palette(0.3, 0.7), io.StringIO()
    painter = render.Painter(out, palette, lambda: 16)
    show = lambda kind, text, token: painter.write(text, token.share)
    turn = conversation.say('x = "日本語 🎉"\n\té', show)
    painter.end_line()
    screen.feed(out.getvalue())
    pending, want = b'', []
    for token in turn.prompt:       # the reply is random bytes: what it shows is compared with shown below
        pending += token.piece
        try:
            want.append((pending.decode(), token.share))
            pending = b''
        except UnicodeDecodeError:
            pass
    assert [(text, token.share) for kind, text, token in turn.shown if kind == 'prompt'] == want
    want += [(text, token.share) for kind, text, token in turn.shown if kind == 'reply']
    assert turn.text == b''.join(token.piece for token in turn.reply).decode('utf-8', 'replace')
    want = [(render.visible(char), background(palette, share)) for text, share in want for char in text
            if char not in ' \n\t' and not unicodedata.combining(char)]
    cells = [cell for line in screen.lines() for cell in line]
    assert [(char[0], back) for char, back in cells if char not in ('', ' ')] == want


def interrupt_after(count):
    """A show() that Ctrl-C comes in, at the count-th piece of a reply."""
    def show(kind, text, token):
        nonlocal count
        count -= kind == 'reply'
        if not count:
            raise KeyboardInterrupt
    return show


def test_decoder_context_matches_the_text_shown(conversation):
    """
    A turn reads only its new tokens: whatever happened before, the decoder's context must be the end of the
    shown text, as bytes.
    """
    conversation.config.stop = 'qqqq'

    def check():
        if conversation.logits is not None:
            context = conversation.decoder.window
            assert conversation.tokens[-len(context):] == context
            logits, _ = conversation.decoder.prefill(context)
            assert np.abs(conversation.logits - logits).max() < 1e-3
        shown = ''.join(text for turn in conversation.turns for _, text, _ in turn.shown)
        assert bytes(conversation.tokens).decode('utf-8', 'replace') == shown

    for typed in ('one', 'two', '', 'x', 'three'):
        conversation.say(typed, silent)
        check()
    assert conversation.say('four', interrupt_after(5)).ended == 'interrupt'
    check()
    assert 5 <= len(conversation.turns[-1].reply) < 20
    conversation.say('', silent)
    check()
    conversation.retry(silent)
    check()
    # stop at what it will say: the same text again, cut where that begins
    state, conversation.logits = conversation.generator.get_state(), None
    free = conversation.say('six', silent)
    conversation.turns.pop()
    conversation.tokens, conversation.logits = free.before, None
    conversation.generator.set_state(state)
    stop = next(free.text[i:i + 2] for i in range(4, 18) if '\ufffd' not in free.text[i:i + 2])
    conversation.config = replace(conversation.config, stop=f'never|{stop}')
    turn = conversation.say('six', silent)
    assert turn.ended == 'stop' and turn.text == free.text[:free.text.index(stop)]
    assert ''.join(text for _, text, _ in turn.shown) == '\nsix' + turn.text
    conversation.say('seven', silent)
    assert bytes(conversation.tokens).decode('utf-8', 'replace').count('seven') == 1


def test_a_prompt_interrupted_while_it_is_read_is_dropped(conversation, monkeypatch):
    """After Ctrl-C in a prompt of 6,000 words, the next question waited until all of them were read again."""
    conversation.say('one', silent)
    before = list(conversation.tokens)

    def interrupted(ids):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversation.decoder, 'step', interrupted)
        turn = conversation.say('a long prompt', silent)
    assert turn.ended == 'interrupt' and not turn.reply and conversation.tokens == before
    conversation.say('two', silent)
    text = bytes(conversation.tokens).decode('utf-8', 'replace')
    assert 'two' in text and 'a long prompt' not in text


def test_a_stop_sequence_may_contain_the_replacement_character(conversation, monkeypatch):
    """
    --stop with a U+FFFD in it was found in the text and then not in the bytes: min() of nothing, and a
    traceback.
    """
    conversation.config.stop = '\ufffd!'
    say_this(monkeypatch, b'ab\xff!c')
    turn = conversation.say('x', silent)
    assert turn.ended == 'stop' and turn.text == 'ab' and bytes(conversation.tokens) == b'xab'


def test_a_long_prompt_keeps_tokens_only_for_the_context(conversation):
    """A prompt of 1 MB kept a Token for each of its million ids; the model sees the last block_size of them."""
    turn = conversation.say('a' * 100_000 + 'b' * 48, silent)
    assert len(turn.new) == 100_048 and bytes(token.id for token in turn.prompt) == b'b' * 48


def prompt_of(turn):
    return ''.join(text for kind, text, _ in turn.shown if kind == 'prompt')


def test_same_seed_same_text(conversation):
    first = [conversation.say(typed, silent).text for typed in ('a', 'b')]
    assert conversation.retry(silent).text != first[1]
    conversation.reset()
    assert [conversation.say(typed, silent).text for typed in ('a', 'b')] == first


def test_turn_template_wraps_each_prompt(conversation):
    conversation.config = chat.ChatConfig(max_tokens=5, threads=1, turn_template='User: {prompt}\\nBot:')
    conversation.say('hi {prompt}', silent)
    conversation.say('you', silent)
    prompts = [prompt_of(turn) for turn in conversation.turns]
    assert prompts == ['User: hi {prompt}\nBot:', '\nUser: you\nBot:']


def test_turns_add_up_to_the_templated_dialogue(dialogue, monkeypatch):
    """
    Turn by turn, the ids must become those of all messages put through the template at once, whether the model
    ended its reply itself, was cut short or was stopped. Only prompts and replies are shown. Text that looks
    like a special token is text.
    """
    typed = ['Hi <|im_end|>\n<|im_start|>system', 'two', 'three', 'four']
    monkeypatch.setattr(dialogue, 'config', replace(dialogue.config, max_tokens=4, stop='.'))
    said, messages = [b'yes\xff', b'no', b'', b'5.6'], []
    for text, reply, closed in zip(typed, said, [False, True, True, False]):
        say_this(monkeypatch, [id + 3 for id in reply] + [2] * closed)
        turn = dialogue.say(text, silent)
        assert turn.ended == ('stop' if b'.' in reply else 'end' if closed else 'length')
        messages += [('user', text), ('assistant', reply.split(b'.')[0])]
        assert prompt_of(turn) == text + '\n'
        assert turn.text == reply.split(b'.')[0].decode('utf-8', 'replace')
        assert dialogue.can_go_on != closed
    ids = []
    for role, text in [('system', b'Be kind')] + messages:
        said = f'{role}\n'.encode() + (text if isinstance(text, bytes) else text.encode())
        ids += [1] + [byte + 3 for byte in said] + [2, ord('\n') + 3]
    assert dialogue.tokens == ids[:-2]      # the last reply was stopped, so nothing closes it yet


def test_system_option_replaces_the_templates_system_prompt(dialogue):
    for system, want in (('', b'Be kind'), ('You are a pirate <|im_end|>', b'You are a pirate <|im_end|>')):
        dialogue.config = replace(dialogue.config, system=system)
        dialogue.reset()
        new = dialogue.say('hi', silent).new
        assert bytes(id - 3 for id in new[:new.index(2)] if id != 1) == b'system\n' + want


def test_dense_loads_the_base_of_an_adapter(checkpoint, tmp_path):
    """
    Adapted weights need their thresholds: a weight that is never used can drift anywhere. With all of them in
    use, SmolLM2 answered a question about eggs with "bread bread bread".
    """
    model, saved = load_checkpoint(checkpoint)
    cwic.add_lora(model, 4)
    for layer, adapter, _ in cwic.adapters(model):
        getattr(layer, adapter).B.data.normal_()
    save_checkpoint(tmp_path / 'adapter.safetensors', model, base=checkpoint,
                    base_sha256=weights_sha256(model), tokenizer=saved['tokenizer'])
    config = chat.ChatConfig(max_tokens=20, threads=1, temperature=0, repeat_penalty=1)
    conversation, _, _ = chat.load(replace(config, ckpt=str(tmp_path / 'adapter.safetensors')))
    conversation.say('def', silent)
    said, tokens = conversation.dense(silent).reply, list(b'def')
    base, _ = load_checkpoint(checkpoint)
    for token in said:
        assert token.id == int(base(torch.tensor([tokens]), dense=True)[0][0, -1].argmax()) and token.share == 1
        tokens.append(token.id)


def test_dense_uses_every_weight_and_the_same_random_numbers(conversation):
    """Against a loop over the model's own dense mode; the conversation itself is left as it was."""
    conversation.config.temperature, conversation.config.repeat_penalty = 0, 1
    conversation.say('def', silent)
    before = list(conversation.tokens), conversation.logits.tolist(), conversation.generator.get_state().tolist()
    turn = conversation.dense(silent)
    tokens = list(b'def')
    for token in turn.reply:
        logits, _ = conversation.model(torch.tensor([tokens]), dense=True)
        assert token.id == int(logits[0, -1].argmax()) and token.share == 1
        tokens.append(token.id)
    assert before == (conversation.tokens, conversation.logits.tolist(), conversation.generator.get_state().tolist())
    # a model without thresholds skips nothing, not even zeros, and the same random numbers give the same text
    for _, layer in conversation.model.sparse_layers():
        layer.theta.data.zero_()
    same = Conversation(conversation.model, conversation.spec, chat.ChatConfig(max_tokens=20, threads=1))
    turn = same.say('def', silent)
    assert turn.text == same.dense(silent).text and turn.share == 1


def test_page_shows_counts_and_colors(conversation, tmp_path):
    conversation.say('if a < b & c:\n\t"日本"', silent)
    conversation.say('\x1b[31m\u202e', silent)
    palette, path = render.Palette(0.3, 0.7), tmp_path / 'page.html'
    render.save_page(conversation.turns, palette, path)
    page = path.read_text(encoding='utf-8')
    shown = [(text, token) for turn in conversation.turns for _, text, token in turn.shown]
    assert [int(n.replace(',', '')) for n in re.findall(r'([\d,]+) active weights', page)] == [
        token.active.sum() for _, token in shown]
    spans = re.findall(r'<span class="(?:prompt|reply)"[^>]*>([^<]*)</span>', page)
    assert [html.unescape(text) for text in spans] == [render.visible(text) for text, _ in shown]
    colors = [tuple(map(int, color)) for color in re.findall(r'background:rgb\((\d+), (\d+), (\d+)\)', page)]
    assert colors[7:] == [palette.rgb(token.share) for _, token in shown]      # after the legend's
    assert 'http' not in page and '<script' not in page and not re.search('[\x1b\u202e]', page)


def test_pictures_have_the_colors_of_the_terminal(dialogue, tmp_path):
    """The picture of a conversation: some pixels of every token's colour, and a line of the legend's."""
    from matplotlib.image import imread
    dialogue.say('plain words', silent)
    palette = render.Palette(0.3, 0.7)
    render.save_picture(dialogue.turns, palette, tmp_path / 'talk.png')
    pixels = (imread(tmp_path / 'talk.png')[:, :, :3] * 255).round().astype(int)
    seen = {tuple(color) for color in pixels.reshape(-1, 3)}
    shares = [token.share for _, text, token in dialogue.turns[0].shown if token]
    for share in shares + [0.3, 0.7]:
        assert any(max(abs(a - b) for a, b in zip(palette.rgb(share), color)) <= 1 for color in seen)
    render.plot_reply(dialogue.turns[0], palette, tmp_path / 'reply.png')
    assert imread(tmp_path / 'reply.png').shape[2] == 4


def test_legend_shows_the_ends_of_the_scale():
    """
    It said 'used 30.0%' and '70.0%', although shares beyond these have the same colours. It fits 80 columns.
    """
    legend = render.Palette(0.3, 0.7).legend()
    text = ''.join(piece for piece, _ in legend)
    assert '<30.0 ' in text and text.endswith(' >70.0') and len(text) < 80
    shares = [share for _, share in legend if share is not None]
    assert np.allclose(shares, np.linspace(0.3, 0.7, len(shares))) and len(shares) > 2


def test_json_escapes_control_characters(conversation):
    """U+009B, which begins an escape code, passed through."""
    turn = conversation.say('\x9b31m \u202e \x7f é', silent)
    line = render.as_json(turn)
    assert not re.search('[\x00-\x1f\x80-\x9f\u202e]', line)
    reply = json.loads(line)
    assert reply['prompt'] == turn.typed and reply['text'] == turn.text


# -----------------------------------------------------------------------------
# the program


ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k not in ('NO_COLOR', 'COLORTERM')},
               'OMP_NUM_THREADS': '1', 'TERM': 'xterm-256color', 'PYTHONIOENCODING': 'utf-8'}


def program(*words, stdin=b'', shell=False):
    words = [sys.executable, str(ROOT / 'chat.py'), *words]
    command = shlex.join(words[:-1]) + words[-1] if shell else words
    return subprocess.run(command, input=stdin, capture_output=True, env=ENVIRONMENT, timeout=60, shell=shell)


def endless(checkpoint, *words):
    options = '--ckpt', checkpoint, '--prompt', 'x', '--max_tokens', '1000000', *words
    return subprocess.Popen([sys.executable, str(ROOT / 'chat.py'), *options],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)


def test_piped_replies_match_generate(checkpoint):
    """
    Plain text is the reply and nothing else; JSON has the same text, and the model's counts; neither has
    escape codes.
    """
    options = '--ckpt', checkpoint, '--temperature=0', '--repeat_penalty', '1', '--max_tokens', '12', '--threads=1'
    plain = program(*options, '--prompt', 'def é')
    assert plain.returncode == 0 and b'\x1b' not in plain.stdout + plain.stderr
    remarks = plain.stderr.decode().splitlines()
    assert remarks[0].startswith(checkpoint) and remarks[1].startswith('12 tokens')
    done = program(*options, '--json', stdin='def é\n\nsecond\n'.encode())
    replies = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert done.returncode == 0 and [reply['prompt'] for reply in replies] == ['def é', 'second']
    assert plain.stdout.decode().rstrip('\n') == replies[0]['text'].rstrip('\n')
    model, _ = load_checkpoint(checkpoint)
    for reply in replies:
        want = list(cwic.generate(model, list(reply['prompt'].encode()), 13))
        passes = [active for _, active in want[1:]]
        assert reply['tokens'] == [token for token, _ in want[:12]]
        assert reply['active'] == [active.tolist() for active in passes]
        assert reply['matrices'] == [name for name, _ in model.sparse_layers()]
        assert sum(reply['dense']) == model.n_weights() and reply['ended'] == 'length'
        mean = np.mean([active.sum() for active in passes])
        assert reply['reduction'] == pytest.approx(model.n_weights() / mean)
        assert reply['first_token_seconds'] > 0 and reply['tokens_per_second'] > 0


def test_a_closed_pipe_ends_quietly(checkpoint):
    """`chat.py ... | head -c 1` used to end in a traceback, some times only while Python shut down."""
    run = endless(checkpoint)
    run.stdout.read(1)
    run.stdout.close()
    errors = run.stderr.read().decode()
    assert run.wait(60) == 141 and len(errors.splitlines()) == 1 and 'Traceback' not in errors


@linux_only
def test_a_full_disk_ends_in_one_line(checkpoint):
    """It gave a traceback."""
    run = program('--ckpt', checkpoint, '--max_tokens', '3', '--prompt', 'x', ' > /dev/full', shell=True)
    assert run.returncode == 1 and b'No space left' in run.stderr and len(run.stderr.splitlines()) <= 2


def test_ctrl_c_keeps_the_partial_reply(checkpoint):
    run = endless(checkpoint, '--json')
    run.stderr.readline()
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    out, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and json.loads(out)['ended'] == 'interrupt' and b'Traceback' not in errors


def main(monkeypatch, capsys, *words, stdin=b'a\n'):
    """chat.main() in this process -> its exit code, stdout, and the lines of stderr."""
    monkeypatch.setattr(sys, 'argv', ['chat.py', *map(str, words)])
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin), newline='\n'))
    try:
        code = chat.main()
    except SystemExit as stopped:
        code = stopped.code
    out, errors = capsys.readouterr()
    return code, out, errors.splitlines()


@pytest.mark.parametrize('words, code, told', [
    (['--ckpt', 'missing.safetensors'], 1, 'missing.safetensors'), (['--ckpt', 'text.safetensors'], 1, 'not a CWIC checkpoint'),
    (['--temprature', '1'], 2, 'temprature'), (['--temperature', 'nan'], 2, 'temperature'),
    (['--top_p', '2'], 2, 'top_p'), (['--prompt', ''], 2, 'the prompt is empty'), (['--turn_template', 'User:'], 2, '{prompt}'),
    (['--max_tokens=0'], 2, 'max_tokens'), (['--dtype', 'f16'], 2, 'dtype'), (['--threads', '0'], 2, 'threads'),
    (['--threads', '99999'], 2, 'threads'), ([], 2, 'the prompt is empty')])
def test_user_errors_are_one_line(words, code, told, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / 'text.safetensors').write_text('not a checkpoint', encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    words = words if '--ckpt' in words else ['--ckpt', checkpoint, *words]
    *run, lines = main(monkeypatch, capsys, *words, stdin=b'\n\n')
    assert run == [code, ''] and told in lines[-1] and len(lines) <= 2


def test_a_model_that_uses_no_weights_or_has_no_percentiles_can_speak(checkpoint, tmp_path, monkeypatch, capsys):
    model, saved = load_checkpoint(checkpoint)
    path = tmp_path / 'odd.safetensors'
    for p in model.parameters():
        p.data.zero_()
    for _, layer in model.sparse_layers():
        layer.theta.data.fill_(1)
    save_checkpoint(path, model, tokenizer=saved['tokenizer'])
    code, out, _ = main(monkeypatch, capsys, '--ckpt', path, '--max_tokens', '2', '--json')
    assert code == 0 and json.loads(out)['share_of_dense'] == 0 and json.loads(out)['reduction'] is None
    assert main(monkeypatch, capsys, '--ckpt', path, '--max_tokens', '2')[2][-1].startswith('2 tokens')


def test_a_tokenizer_may_be_smaller_than_its_model(tmp_path, monkeypatch, capsys):
    """Ids beyond the tokenizer's must never be drawn."""
    path = make_checkpoint(tmp_path / 'odd.safetensors', tokenizer_spec('bytes'), 300)
    model, _ = load_checkpoint(path)
    with torch.no_grad():
        model.head.weight[:, 257:] *= 100
    save_checkpoint(path, model, tokenizer=tokenizer_spec('bytes'))
    code, out, _ = main(monkeypatch, capsys, '--ckpt', path, '--json', '--max_tokens', '50')
    assert code == 0 and max(json.loads(out)['tokens']) < 257
    save_checkpoint(path, model)
    code, out, lines = main(monkeypatch, capsys, '--ckpt', path)
    assert (code, out, len(lines)) == (1, '', 1) and 'tokenizer' in lines[0]


def test_a_name_is_the_dense_model_and_a_file_the_adapter(checkpoint, chat_checkpoint, tmp_path, monkeypatch,
                                                          capsys):
    """smollm2 was the sparse model here and the dense one in evaluate.py. The first line says which it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, 'ADAPTER', chat_checkpoint)
    code, _, lines = main(monkeypatch, capsys, '--max_tokens', '2', '--threads', '1')
    assert code == 0 and lines[0] == 'SmolLM2-135M-Instruct (Apache-2.0), sparse: 0.0M parameters; f32, 1 thread'
    os.mkdir('out')
    shutil.copy(checkpoint, 'out/best.safetensors')
    code, _, lines = main(monkeypatch, capsys, '--max_tokens', '2')
    assert code == 0 and lines[0].startswith('out/best.safetensors, sparse')
    asked = []
    monkeypatch.setattr('weights.load', lambda source: asked.append(source) or load_checkpoint(checkpoint))
    lines = main(monkeypatch, capsys, '--max_tokens', '2', '--ckpt', 'smollm2')[2]
    assert asked == ['smollm2'] and lines[0].startswith('smollm2, ')


def test_a_symlink_to_the_program_finds_the_adapter(tmp_path):
    """ln -s .../chat.py ~/bin/ looked for adapters/ in ~/bin, and ran dense without a word."""
    (tmp_path / 'chat.py').symlink_to(ROOT / 'chat.py')
    code = 'import chat; print(chat.ADAPTER)'
    run = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                         env={**ENVIRONMENT, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'})
    assert run.stdout == f'{chat.ADAPTER}\n' and chat.ADAPTER.startswith(str(ROOT.resolve()))


def test_dense_option_uses_every_weight(checkpoint, tmp_path, monkeypatch, capsys):
    """A model trained as a whole uses its own weights, an adapter those of its base; the first line says which."""
    model, saved = load_checkpoint(checkpoint)
    want = [int(token) for token in plain_dense(model, list(b'def'), 8)]
    cwic.add_lora(model, 4)
    for layer, adapter, _ in cwic.adapters(model):
        getattr(layer, adapter).B.data.normal_()
    adapted = str(tmp_path / 'adapter.safetensors')
    save_checkpoint(adapted, model, base=checkpoint, base_sha256=weights_sha256(model),
                    tokenizer=saved['tokenizer'])
    for path, name in ((checkpoint, checkpoint), (adapted, f'{checkpoint}, the base of {adapted}')):
        code, out, lines = main(monkeypatch, capsys, '--ckpt', path, '--dense', '--json', '--temperature', '0',
                                '--repeat_penalty', '1', '--max_tokens', '8', stdin=b'def\n')
        assert code == 0 and lines[0].startswith(f'{name}, dense: ')
        assert json.loads(out)['tokens'] == want and json.loads(out)['share_of_dense'] == 1


@torch.no_grad()
def plain_dense(model, tokens, count):
    for _ in range(count):
        tokens = tokens + [int(model(torch.tensor([tokens]), dense=True)[0][0, -1].argmax())]
        yield tokens[-1]


def test_repeat_penalty_covers_the_last_64_tokens_of_the_reply(conversation):
    """Against the same rule by hand: it penalises the last 64 tokens of the reply, and none of the prompt."""
    conversation.config = chat.ChatConfig(temperature=0, repeat_penalty=1.3, max_tokens=100, threads=1)
    turn = conversation.say('ab', silent)
    decoder, said = conversation.decoder, []
    logits, _ = decoder.prefill(list(b'ab'))
    for token in turn.reply:
        changed = logits.astype(np.float64)
        for id in set(said[-64:]):
            changed[id] = changed[id] / 1.3 if changed[id] > 0 else changed[id] * 1.3
        said.append(int(changed.argmax()))
        logits, _ = decoder.step(said[-1])
    assert [token.id for token in turn.reply] == said
    conversation.config = replace(conversation.config, repeat_penalty=1)
    conversation.reset()
    assert [token.id for token in conversation.say('ab', silent).reply] != said


def test_a_byte_order_mark_is_no_part_of_a_piped_prompt(checkpoint, monkeypatch, capsys):
    words = '--ckpt', checkpoint, '--max_tokens', '1', '--threads', '1', '--json'
    code, out, _ = main(monkeypatch, capsys, *words, stdin='\ufeffé 1\r\nb\r\n'.encode())
    assert code == 0 and [json.loads(line)['prompt'] for line in out.splitlines()] == ['é 1', 'b']


def test_help_does_not_wait_for_torch():
    words = [sys.executable, '-X', 'importtime', str(ROOT / 'chat.py'), '--help']
    run = subprocess.run(words, capture_output=True, text=True)
    assert '--turn_template' in run.stdout and not re.search(r'\| +(torch|matplotlib|tiktoken)\n', run.stderr)


def test_without_a_compiler_it_says_so_once_and_goes_on(checkpoint, monkeypatch, capsys):
    """Sparse inference without its kernel fell back, silently, to a slower dense masked product."""
    def none(*_):
        raise build_kernel.KernelUnavailable('no C compiler found: install gcc')
    monkeypatch.setattr('build_kernel.load', none)
    words = '--ckpt', checkpoint, '--max_tokens', '3', '--temperature', '0'
    code, out, lines = main(monkeypatch, capsys, *words, stdin=b'a\nb\n')
    assert code == 0 and out and sum('no C compiler' in line for line in lines) == 1
    assert sum(line.startswith('3 tokens') for line in lines) == 2


def command(capsys, conversation, line):
    """-> the output of a command on a terminal, without colours"""
    at_terminal = chat.Chat(conversation, render.Palette(0.3, 0.7, colored=False), terminal=True, as_json=False)
    capsys.readouterr()
    at_terminal.command(line, '')
    return capsys.readouterr().out


def test_dense_command_shows_the_first_token_that_differs(conversation, monkeypatch, capsys):
    """A newline and half a character are shown as escapes, on one line."""
    conversation.config.max_tokens = 3
    say_this(monkeypatch, b'a\nb' + b'a\xf0b' + b'a\nb')
    conversation.say('x', silent)
    shown = command(capsys, conversation, 'dense').splitlines()
    assert "they differ from token 2 on: '\\n' (sparse), '\ufffd' (dense)" in shown
    assert shown[0] == 'trained to skip weights: with all of them, this model is often worse'   # it has no base
    assert ' dense: ' in shown[-1] and shown[-1].endswith(' times as fast')
    shown = command(capsys, conversation, 'dense')
    assert f'the same 3 tokens as with {100 * conversation.turns[0].share:.1f}% of the weights\n' in shown


def test_dense_command_on_a_dense_model_does_not_run_it_again(conversation, monkeypatch, capsys):
    dense = Conversation(conversation.model, conversation.spec, chat.ChatConfig(dense=True, max_tokens=2, threads=1))
    dense.say('x', silent)
    assert command(capsys, dense, 'dense') == 'this model is dense: the reply above used every weight\n'


class Session:
    """The program in a pseudo-terminal: sends keys, and waits for the output."""

    def __init__(self, *words, columns=60, **environ):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
        self.before, self.seen = termios.tcgetattr(self.ours), ''

        def own_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.run = subprocess.Popen([sys.executable, str(ROOT / 'chat.py'), *words], stdin=theirs,
                                    stdout=theirs, stderr=theirs, env={**ENVIRONMENT, **environ},
                                    preexec_fn=own_terminal)
        os.close(theirs)

    def read(self, seconds):
        """Reads more output; False if none came in time, or the program is gone."""
        try:
            if select.select([self.ours], [], [], seconds)[0]:
                new = os.read(self.ours, 65536)
                self.seen += new.decode('utf-8', 'replace')
                return bool(new)
        except OSError:     # Linux: the other side was closed
            pass
        return False

    def keys(self, text, until):
        """Types text, and returns the output from then on, up to a match of the pattern or a little further."""
        start = len(self.seen)
        os.write(self.ours, text.encode())
        end = time.time() + 60
        while not re.search(until, self.seen[start:]):
            alive = self.read(5) or self.run.poll() is None
            assert time.time() < end and alive, f'{until!r} never came: {self.seen[start:]!r}'
        return self.seen[start:]

    def leave(self):
        """-> the exit code, after reading to the end."""
        while self.read(5):
            pass
        return self.run.wait(20)


def test_every_command_in_a_terminal_session(checkpoint, tmp_path):
    """
    A prompt, the commands, Ctrl-C in the middle of a reply, and Ctrl-D. If matplotlib's backend was missing, /save
    ended in a traceback, and the conversation was lost.
    """
    session = Session('--ckpt', checkpoint, '--max_tokens', '30', '--threads', '1',
                      MPLBACKEND='module://matplotlib_inline.backend_inline')
    session.keys('', r' >\d+\.\d\r\n.*> ')
    summary = r'30 tokens, \d+/s, first \d+ ms; used [\d.]+%,\s+reduction\s+[\d.]+;\s+f32, 1\s+thread[\s\S]*> '
    shown = session.keys('def f(n):\r', summary)
    assert '\x1b[38;5;' in shown
    assert shown.count('def f(n):') == 1            # the terminal's own echo: the prompt is not painted again
    assert re.search(r'layer 1.*head', session.keys('/layers\r', r'head[^\n]*\n[^\n]*> '), re.S)
    assert len(re.findall(r' +[\d.,]+ +[\d.]+ +\d\.\d\d\r', session.keys('/tokens\r', r' 30  [\s\S]*\n[^\n]*> '))) >= 30
    assert re.search(r'tokens/s\s+with[\s\S]*\sdense:[\s\S]*\stimes\s', session.keys('/dense\r', r'as\s+fast[\s\S]*> '))
    session.keys(f'/save {tmp_path}/a.html\r', r'wrote\s[\s\S]*> ')
    session.keys(f'/plot {tmp_path}/a.png\r', r'wrote\s[\s\S]*> ')
    session.keys(f'/save {tmp_path}/b.png\r', r'wrote\s[\s\S]*> ')
    assert (tmp_path / 'a.html').stat().st_size > 1000
    assert all((tmp_path / name).read_bytes()[:4] == b'\x89PNG' for name in ('a.png', 'b.png'))
    session.keys('/save /nowhere/a.html\r', r'No such file[\s\S]*> ')
    session.keys('/plot /nowhere/a.png\r', r'No such file[\s\S]*> ')
    session.keys('/plot\r', r'FILE.png[\s\S]*> ')
    session.keys('/retry\r', r'30 tokens[\s\S]*> ')
    session.keys('/help\r', r'/quit[\s\S]*> ')
    session.keys('/rest\r', r'no command /rest[\s\S]*> ')
    session.keys('/set temperature hot\r', r'temperature must be a [\s\S]*> ')
    session.keys('/set threads 2\r', r'threads cannot be set[\s\S]*> ')
    session.keys('/set top_p 3\r', r'top_p must be at most 1[\s\S]*> ')
    session.keys('/set turn_template x\r', r'turn_template must hold {prompt}[\s\S]*> ')
    session.keys('/set max_tokens 1000000\r', '> ')
    assert '1000000' in session.keys('/set\r', r'turn_template[^\n]*\n[^\n]*> ')
    session.keys('long\r', r'(48;5[\s\S]*?){20}')          # well into the reply
    shown = session.keys('\x03', r'\d+ tokens, [\s\S]*> ')
    last = re.findall(r'\x1b\[[0-9;]*m', shown)[-1]
    assert last == '\x1b[0m'
    session.keys('/reset\r', '> ')
    session.keys('\r', '> ')
    session.keys('/layers\r', r'needs a reply first[\s\S]*> ')
    os.write(session.ours, b'\x04')
    assert session.leave() == 0 and 'Traceback' not in session.seen
    assert termios.tcgetattr(session.ours) == session.before


def test_pasted_lines_make_one_prompt(checkpoint, tmp_path):
    """Each line of a paste was a prompt of its own."""
    session = Session('--ckpt', checkpoint, '--max_tokens', '30', '--threads', '1', NO_COLOR='1')
    session.keys('', 'leaves[^\n]*\n[^\n]*> ')
    shown = session.keys('\x1b[200~first\rsecond\x1b[201~\r', r'1 thread\r\n[\s\S]*> ')
    assert shown.count('30 tokens') == 1
    session.keys(f'/save {tmp_path}/page.html\r', r'wrote\s[\s\S]*> ')
    page = (tmp_path / 'page.html').read_text(encoding='utf-8')
    assert 'first\nsecond' in re.sub('<[^>]*>', '', page)
    os.write(session.ours, b'/quit\r')
    assert session.leave() == 0
    assert not re.search(r'\x1b\[(38|2m)', session.seen)


def test_ctrl_c_at_the_prompt_drops_the_line(checkpoint):
    session = Session('--ckpt', checkpoint, '--max_tokens', '3', '--threads', '1')
    session.keys('', '> ')
    time.sleep(1)       # Python notices a Ctrl-C before it waits for keys only at the next key
    session.keys('half a line\x03', 'Ctrl-D leaves[^\n]*\n[^\n]*> ')
    assert session.keys('x\r', r'3 tokens[\s\S]*> ').count('half') == 0
    os.write(session.ours, b'\x04')
    assert session.leave() == 0 and 'Traceback' not in session.seen
    assert termios.tcgetattr(session.ours) == session.before


def test_a_dialogue_on_a_terminal_is_drawn_on_its_colors(chat_checkpoint):
    """
    The prompt is shown without its template. A wide character takes two cells of one colour, which is that of
    the pass over the token that completes it.
    """
    words = '--ckpt', chat_checkpoint, '--prompt', 'a日本b', '--max_tokens', '50', '--threads', '1'
    session = Session(*words)
    assert session.leave() == 0
    screen = Screen(60, 24)
    screen.feed(session.seen)
    line = next(line for line in screen.lines() if ''.join(char for char, _ in line).startswith('a日本b'))
    assert [char for char, _ in line[:7]] == ['a', '日', '', '本', '', 'b', ' '] and line[6][1] is None
    model, saved = load_checkpoint(chat_checkpoint)
    ids = dialogue_ids(CHAT_SPEC, load_tokenizer(CHAT_SPEC), [('user', 'a日本b')])
    with torch.no_grad():
        active = model(torch.tensor([ids]))[1]          # (M, 1, T)
    shares = active[:, 0].sum(0) / model.n_weights()        # of the pass over each id; the typed bytes begin at
    first = next(i for i in range(len(ids)) if ids[i:i + 8] == [b + 3 for b in 'a日本b'.encode()])
    palette = render.Palette(*(saved['compute_percentiles'][p] for p in ('5', '95')))
    want = [background(palette, float(shares[first + i])) for i in (0, 3, 3, 6, 6, 7)]
    assert [back for _, back in line[:6]] == want
