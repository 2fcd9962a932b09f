"""
chat.py and render.py: what a terminal shows, against a small terminal written here; what is counted, against cwic.generate();
and the program itself, in pipes and in a pseudo-terminal.
"""

import fcntl
import html
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import build_kernel
import chat
import cwic
import render
from conversation import Conversation, Speller, Token, choose
from tokenizer import load_tokenizer, tokenizer_spec

# -----------------------------------------------------------------------------
# a terminal


class Screen:
    """
    As much of a terminal as our output needs: colours, newlines, wrapping at the right margin, wide characters, erasing
    to the end of a line, scrolling. As xterm does, it fills lines that scroll into view with the current background.
    cells: lines of [character, background]; the background is None, (r, g, b), or an index of 256.
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
        if code == '\x1b[K':
            # a cursor that waits to wrap stands on the last column, which is then erased
            for x in range(min(self.x, self.columns - 1), self.columns):
                self.cells[self.y][x] = [' ', self.back]
            return
        assert code[-1] == 'm', f'unexpected {code!r}'
        numbers = [int(n or 0) for n in code[2:-1].split(';')]
        if numbers[0] == 0:
            self.back = None
        elif numbers[0] == 38:
            length = 5 if numbers[1] == 2 else 3
            assert numbers[length] == 48
            self.back = tuple(numbers[length + 2:]) if numbers[1] == 2 else numbers[length + 2]
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


def drawn(pieces, columns, mode='truecolor', rows=3):
    """[(text, share)] painted on a Screen -> the Screen and the palette."""
    screen, palette = Screen(columns, rows), render.Palette(mode, 0.2, 0.8)
    out = io.StringIO()
    painter = render.Painter(out, palette, lambda: columns)
    for text, share in pieces:
        out.seek(0), out.truncate()
        painter.write(text, share)
        screen.feed(out.getvalue())
        assert screen.back is None, 'a colour survived the piece it belongs to: an interrupt here would leave it on'
    return screen, palette


PIECES = [('def', None), (' f(é', 0.25), ('日本語', 0.7), (')\n    ', 0.4), ('\tx', 0.6), ('e\u0301=🎉🎉', 0.3), ('\n\n', 0.8),
          ('wrap ' * 9, 0.5), ('\n', 0.2), ('12345', 0.3), ('67890', 0.7), ('!', 0.2)]


@pytest.mark.parametrize('columns', [10, 11, 80])
@pytest.mark.parametrize('mode', ['truecolor', '256'])
def test_each_character_stands_on_its_color_and_nothing_else_does(columns, mode):
    """
    A terminal that scrolls because a line wraps fills the new line with the background of the moment: a coloured reply
    then leaves bars to the right margin. And a tab leaves what it skips unpainted.
    """
    screen, palette = drawn(PIECES, columns, mode)

    def back(share):
        if share is None:
            return None
        return palette.rgb(share) if mode == 'truecolor' else render.nearest_256(palette.rgb(share))[0]

    # the same text laid out by hand: a list of lines of [character, background]
    want, line = [], []
    for text, share in PIECES:
        for char in text:
            if char == '\n':
                want.append(line)
                line = []
            elif char == '\t':
                line += [[' ', back(share)] for _ in range(min(8 - len(line) % 8, columns - len(line)))]
            elif unicodedata.combining(char):
                line[-1][0] += char
            else:
                cells = [[char, back(share)]] + ([['', back(share)]] if unicodedata.east_asian_width(char) == 'W' else [])
                if len(line) + len(cells) > columns:
                    want.append(line)
                    line = []
                line += cells
    want.append(line)
    want = [line + [[' ', None]] * (columns - len(line)) for line in want]
    got = screen.lines()
    assert got[:len(want)] == want
    assert all(cell == [' ', None] for line in got[len(want):] for cell in line)


def test_what_a_model_says_cannot_steer_the_terminal():
    """Escape codes in a reply were obeyed: a model that had seen colour codes in its text could clear the screen."""
    screen, _ = drawn([('a\x1b[2J\x07\r\x7f\x9b1mb', 0.5)], 40)
    assert ''.join(char for char, _ in screen.lines()[0]).rstrip() == 'a\u241b[2J\u2407\u240d\u2421\ufffd1mb'


def test_without_colors_there_are_no_codes():
    out = io.StringIO()
    painter = render.Painter(out, render.Palette('none', 0, 1), lambda: 4)
    painter.write('plain\ttext\n日本語', 0.5)
    assert '\x1b' not in out.getvalue()


def lightness(rgb):
    """CIE 1976 L*, from 0 to 100."""
    y = render.luminance(rgb)
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def xterm(index):
    """The colour that a terminal shows for an index from 16 to 255."""
    if index >= 232:
        return (8 + 10 * (index - 232),) * 3
    return tuple(0 if v == 0 else 55 + 40 * v for v in ((index - 16) // 36, (index - 16) // 6 % 6, (index - 16) % 6))


def test_the_scale_grows_darker_evenly_and_text_stays_readable():
    """Lightness, measured in another space than the scale was made in, falls all the way, by steps within a third of the mean."""
    scale = [render.scale_color(i / 20) for i in range(21)]
    steps = -np.diff([lightness(color) for color in scale])
    assert (steps > 0).all() and steps.max() < 1.34 * steps.mean() and steps.min() > 0.66 * steps.mean()
    coarse = [lightness(xterm(render.nearest_256(color)[0])) for color in scale]
    assert (np.diff(coarse) <= 0).all() and len(set(coarse)) >= 8
    for color in scale + [xterm(render.nearest_256(color)[0]) for color in scale]:
        light, dark = sorted((render.luminance(color), render.luminance(render.text_color(color))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize('environ, mode', [
    ({'TERM': 'xterm-256color', 'COLORTERM': 'truecolor'}, 'truecolor'), ({'TERM': 'xterm-256color'}, '256'), ({'TERM': 'tmux'}, '256'),
    ({'TERM': 'xterm-256color', 'COLORTERM': 'truecolor', 'NO_COLOR': '1'}, 'none'), ({'TERM': 'dumb', 'COLORTERM': 'truecolor'}, 'none'),
    ({'TERM': 'vt100'}, 'none'), ({}, 'none')])
def test_color_mode(environ, mode):
    stream = io.StringIO()
    assert render.color_mode(stream, environ) == 'none'
    stream.isatty = lambda: True
    assert render.color_mode(stream, environ) == mode


# -----------------------------------------------------------------------------
# text from tokens


def spell(pieces, stops=()):
    speller = Speller(stops)
    tokens = [Token(i, piece, None, None) for i, piece in enumerate(pieces)]
    shown = []
    for token in tokens:
        shown += speller.feed(token)
        if speller.stopped:
            return [(text, token.id) for text, token in shown], True
    return [(text, token.id) for text, token in shown + speller.end()], False


def test_a_character_split_over_tokens_comes_whole_with_the_last_of_them():
    """Tokens printed one at a time through decode() broke every character that two of them share."""
    party = '🎉'.encode()
    assert spell([b'a', party[:1], party[1:3], party[3:] + b'b']) == ([('a', 0), ('🎉b', 3)], False)
    assert spell([b'a' + party[:2]]) == ([('a', 0), ('\ufffd', 0)], False)
    assert spell([party[:2], b'b']) == ([('\ufffdb', 1)], False)
    assert spell([]) == ([], False)


def test_stop_sequences_are_never_shown_wherever_they_are_cut():
    text = 'yes.\nUser: no'
    for cut in range(1, len(text)):
        for second in range(cut, len(text)):
            shown, stopped = spell([text[:cut].encode(), text[cut:second].encode(), text[second:].encode()], ['\nUser:', 'never'])
            assert ''.join(piece for piece, _ in shown) == 'yes.' and stopped
    # what only begins like one is held back, but not lost
    assert spell([b'a\nUs', b'e', b'd'], ['\nUser:']) == ([('a', 0), ('\nUs', 0), ('e', 1), ('d', 2)], False)
    assert spell([b'a\nUs'], ['\nUser:']) == ([('a', 0), ('\nUs', 0)], False)


def test_choose_samples_from_what_temperature_top_k_and_top_p_leave():
    """Against frequencies computed here from the definition; and the probability told is the model's own."""
    logits = np.random.default_rng(0).normal(0, 2, 12).astype(np.float32)
    model = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    for temperature, top_k, top_p in ((1, 0, 1), (0.5, 0, 1), (1, 3, 1), (2, 0, 0.6), (0.7, 5, 0.8), (1, 1, 1), (1, 0, 1e-9), (1e-3, 0, 1)):
        config = chat.ChatConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        q = np.exp((logits.astype(float) - logits.max()) / temperature)
        for i in np.argsort(-q)[top_k or len(q):]:
            q[i] = 0
        q, total = q / q.sum(), 0
        for i in np.argsort(-q):
            q[i], total = q[i] * (total < top_p), total + q[i]
        q /= q.sum()
        rng = np.random.default_rng(1)
        drawn = [choose(logits, config, rng) for _ in range(4000)]
        assert all(p == pytest.approx(model[token]) for token, p in drawn)
        assert np.abs(np.bincount([token for token, _ in drawn], minlength=12) / 4000 - q).max() < 0.03
    assert choose(logits, chat.ChatConfig(temperature=0), rng)[0] == logits.argmax()


# -----------------------------------------------------------------------------
# conversations, on a small random model that speaks in bytes: nearly every character is split


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    model = cwic.GPT(cwic.CWICConfig(vocab_size=257, block_size=48, n_layer=2, n_head=2, n_embd=32, stripe_qkv=32, stripe_out=20,
                                     stripe_up=48, stripe_down=32, stripe_head=100))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        for _ in range(3):
            hidden, _, sums = model.trunk(torch.randint(257, (4, 48)))
            model.update_statistics(sums + [model.head(hidden)[2]])
        for _, linear in model.linears():
            linear.theta.copy_(torch.rand(linear.theta.shape) * 1.5 / linear.scale)
        model.head.weight[:, 256] = -10 * hidden.mean((0, 1))        # never says <|endoftext|>
        shares = model.eval()(torch.randint(257, (4, 48)))[1].sum(0) / model.dense()
    path = tmp_path_factory.mktemp('chat') / 'tiny.pt'
    cwic.save_checkpoint(path, model, tokenizer=tokenizer_spec('bytes'), step=3, val_loss=5.5, reduction=float(1 / shares.mean()),
                         compute_percentiles={str(p): float(np.percentile(shares, p)) for p in (5, 50, 95)})
    return str(path)


@pytest.fixture
def conversation(checkpoint):
    model, saved = cwic.load_checkpoint(checkpoint)
    return Conversation(model, load_tokenizer(saved['tokenizer']), chat.ChatConfig(max_tokens=20, threads=1))


def silent(*_):
    pass


def never():
    return False


def test_counts_are_those_of_the_pass_that_made_each_token(conversation):
    """Compute used to be counted by a second forward after generation: it cost as much again, and was another context's."""
    conversation.config.temperature, conversation.config.max_tokens = 0, 100        # the context, of 48, slides twice
    turn = conversation.say('Kraków 日本', silent, never)
    prompt = list('Kraków 日本'.encode())
    want = list(cwic.generate(conversation.model, prompt, 100))
    assert [token.id for token in turn.reply] == [token for token, _ in want]
    for token, (_, active) in zip(turn.reply, want):
        assert token.active.tolist() == active.tolist()
        assert token.share == pytest.approx(active.sum().item() / conversation.model.dense())
    _, active = conversation.model(torch.tensor([prompt]))          # (M, 1, T): each token of the prompt predicts the next
    assert turn.prompt[0].active is None
    assert [token.active.tolist() for token in turn.prompt[1:]] == active[:, 0, :-1].t().tolist()


def test_the_stream_of_a_reply_shows_split_and_wide_characters_on_their_colors(conversation):
    """Every character, prompt and reply, stands on the colour of the token that completed it."""
    conversation.config.max_tokens = 40
    screen, palette, out = Screen(16, 30), render.Palette('truecolor', 0.3, 0.7), io.StringIO()
    painter = render.Painter(out, palette, lambda: 16)
    turn = conversation.say('x = "日本語 🎉"\n\té', lambda kind, text, token: painter.write(text, token.share), never)
    screen.feed(out.getvalue())
    tokens, pending, want = turn.prompt + turn.reply, b'', []
    for i, token in enumerate(tokens):
        pending += token.piece
        if i < len(turn.prompt):        # the reply is random bytes: what it shows is compared with shown below
            try:
                want.append((pending.decode(), token.share))
                pending = b''
            except UnicodeDecodeError:
                pass
    assert [(text, token.share) for kind, text, token in turn.shown if kind == 'prompt'] == want
    want += [(text, token.share) for kind, text, token in turn.shown if kind == 'reply']
    assert turn.text == b''.join(token.piece for token in turn.reply).decode('utf-8', 'replace')
    want = [(render.visible(char), None if share is None else palette.rgb(share)) for text, share in want for char in text
            if char not in ' \n\t' and not unicodedata.combining(char)]
    assert [(char[0], back) for line in screen.lines() for char, back in line if char not in ('', ' ')] == want


def test_what_the_decoder_has_read_is_always_the_text_so_far(conversation):
    """
    Only what is new is read in a turn: whatever happened before, the decoder's window has to be the end of the text that
    was shown, as bytes, less a last token that is still to be read.
    """
    conversation.config.stop = 'qqqq'

    def check():
        known = conversation.tokens[:conversation.known]
        assert conversation.known == 0 or known[-len(conversation.decoder.window):] == conversation.decoder.window
        shown = ''.join(text for turn in conversation.turns for _, text, _ in turn.shown)
        assert bytes(conversation.tokens).decode('utf-8', 'replace') == shown

    for typed in ('one', 'two', '', 'x' * 70, 'three'):             # one longer than the context
        conversation.say(typed, silent, never)
        check()
    pressed = iter([False] * 5 + [True])
    assert conversation.say('four', silent, lambda: next(pressed)).ended == 'interrupt'
    check()
    assert len(conversation.turns[-1].reply) == 5
    conversation.say('five', silent, lambda: True)                  # stopped before anything was said
    check()
    conversation.say('', silent, never)
    check()
    conversation.retry(silent, never)
    check()
    # stop at what it will say: the same text again, cut where that begins
    state, conversation.known = conversation.rng.bit_generator.state, 0
    free = conversation.say('six', silent, never)
    conversation.turns.pop()
    conversation.tokens, conversation.known, conversation.rng.bit_generator.state = free.before, 0, state
    stop = next(free.text[i:i + 2] for i in range(4, 18) if '\ufffd' not in free.text[i:i + 2])
    conversation.config = replace(conversation.config, stop=f'never|{stop}')
    turn = conversation.say('six', silent, never)
    assert turn.ended == 'stop' and turn.text == free.text[:free.text.index(stop)]
    check()
    conversation.say('seven', silent, never)
    check()


def test_same_seed_same_text(conversation):
    first = [conversation.say(typed, silent, never).text for typed in ('a', 'b')]
    assert conversation.retry(silent, never).text != first[1]
    conversation.reset()
    assert [conversation.say(typed, silent, never).text for typed in ('a', 'b')] == first


def test_turn_template(conversation):
    conversation.config = chat.ChatConfig(max_tokens=5, threads=1, turn_template='User: {prompt}\\nBot:')
    conversation.say('hi {prompt}', silent, never)
    conversation.say('you', silent, never)
    first, second = (''.join(text for kind, text, _ in turn.shown if kind == 'prompt') for turn in conversation.turns)
    assert first == 'User: hi {prompt}\nBot:' and second == '\nUser: you\nBot:'


def test_dense_uses_every_weight_and_the_same_random_numbers(conversation):
    """Against a loop over the model's own dense mode; the conversation itself is left as it was."""
    conversation.config.temperature = 0
    conversation.say('def', silent, never)
    before = list(conversation.tokens), conversation.known, conversation.rng.bit_generator.state
    turn = conversation.dense(silent, never)
    tokens = list(b'def')
    for token in turn.reply:
        logits, _ = conversation.model(torch.tensor([tokens]), dense=True)
        assert token.id == int(logits[0, -1].argmax()) and token.share == 1
        tokens.append(token.id)
    assert before == (conversation.tokens, conversation.known, conversation.rng.bit_generator.state)
    # where nothing is skipped anyway, the same random numbers give the same text
    for _, linear in conversation.model.linears():
        linear.theta.data.zero_()
    same = Conversation(conversation.model, conversation.encoding, chat.ChatConfig(max_tokens=20, threads=1))
    assert same.say('def', silent, never).text == same.dense(silent, never).text


def test_page_holds_the_decoders_counts(conversation, tmp_path):
    conversation.say('if a < b & c:\n\t"日本"', silent, never)
    conversation.say('\x1b[31m', silent, never)
    path = tmp_path / 'page.html'
    render.save_page(conversation.turns, render.Palette('none', 0.3, 0.7), path)
    page = path.read_text(encoding='utf-8')
    shown = [(text, token) for turn in conversation.turns for _, text, token in turn.shown]
    colored = [token for _, token in shown if token.active is not None]
    assert [int(n) for n in re.findall(r'data-active="(\d+)"', page)] == [token.active.sum() for token in colored]
    spans = re.findall(r'<span class="(?:prompt|reply)"[^>]*>([^<]*)</span>', page)
    assert [html.unescape(text) for text in spans] == [''.join(c if c in '\n\t' else render.visible(c) for c in text) for text, _ in shown]
    colors = [tuple(map(int, color)) for color in re.findall(r'background:rgb\((\d+), (\d+), (\d+)\)', page)]
    assert colors == [render.Palette('none', 0.3, 0.7).rgb(token.share) for token in colored]
    assert 'http' not in page and '<script' not in page and '\x1b' not in page


# -----------------------------------------------------------------------------
# the program


ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k not in ('NO_COLOR', 'COLORTERM')},
               'OMP_NUM_THREADS': '1', 'TERM': 'xterm-256color', 'PYTHONIOENCODING': 'utf-8'}


def program(*words, stdin=b''):
    return subprocess.run([sys.executable, str(ROOT / 'chat.py'), *words], input=stdin, capture_output=True, env=ENVIRONMENT, timeout=60)


def endless(checkpoint, *words):
    options = '--ckpt', checkpoint, '--prompt', 'x', '--max-tokens', '1000000', *words
    return subprocess.Popen([sys.executable, str(ROOT / 'chat.py'), *options],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)


def test_pipes(checkpoint):
    """Plain text is the continuation and nothing else, JSON says the same and has the decoder's counts, and neither has a code."""
    options = '--ckpt', checkpoint, '--temperature', '0', '--max-tokens', '12', '--threads=1', '--color', 'truecolor'
    plain = program(*options, '--prompt', 'def é')
    assert plain.returncode == 0 and b'\x1b' not in plain.stdout + plain.stderr
    assert plain.stderr.decode().splitlines()[0].startswith(checkpoint) and '12 tokens' in plain.stderr.decode()
    done = program(*options, '--json', stdin='def é\n\nsecond\n'.encode())
    replies = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert done.returncode == 0 and [reply['prompt'] for reply in replies] == ['def é', 'second']
    assert plain.stdout.decode().rstrip('\n') == replies[0]['text'].rstrip('\n')
    model, _ = cwic.load_checkpoint(checkpoint)
    for reply in replies:
        want = list(cwic.generate(model, list(reply['prompt'].encode()), 12))
        assert reply['tokens'] == [token for token, _ in want] and reply['active'] == [active.tolist() for _, active in want]
        assert reply['matrices'] == [name for name, _ in model.linears()] and sum(reply['dense']) == model.dense()
        assert reply['reduction'] == pytest.approx(model.dense() / np.mean([active.sum() for _, active in want]))
        assert reply['ended'] == 'length' and reply['first_token_seconds'] > 0 and reply['tokens_per_second'] > 0


def test_a_prompt_longer_than_the_context_is_said_to_be_cut(checkpoint):
    """In a pipe it was cut to the context without a word. Bytes are tokens here, so the prompt's length is known."""
    size = cwic.load_checkpoint(checkpoint)[0].config.block_size
    run = program('--ckpt', checkpoint, '--prompt', 'a' * (size + 5), '--max_tokens', '3')
    assert run.returncode == 0 and f'the prompt has {size + 5} tokens, of which the model saw the last {size}' in run.stderr.decode()


def test_a_closed_pipe_ends_quietly(checkpoint):
    """`chat.py ... | head -c 1` used to end in a traceback, some times only while Python shut down."""
    run = endless(checkpoint)
    run.stdout.read(1)
    run.stdout.close()
    errors = run.stderr.read().decode()
    assert run.wait(60) == 141 and len(errors.splitlines()) == 1 and 'Traceback' not in errors


def test_an_interrupted_pipe_keeps_what_was_said(checkpoint):
    run = endless(checkpoint, '--json')
    run.stderr.readline()
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    out, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and json.loads(out)['ended'] == 'interrupt' and b'Traceback' not in errors


@pytest.mark.parametrize('words, code, told', [
    ([], 1, 'python train.py'), (['--ckpt', 'missing.pt'], 1, 'missing.pt'), (['--ckpt', 'text.pt'], 1, 'not a CWIC checkpoint'),
    (['--temprature', '1'], 2, 'did you mean temperature'), (['--temperature', 'hot'], 2, 'temperature'), (['--top-p', '2'], 2, 'top_p'),
    (['--prompt', ''], 2, 'empty'), (['--turn-template', 'User:'], 2, '{prompt}'), (['--color', 'red'], 2, 'color'),
    (['--max-tokens=0'], 2, 'max_tokens'),
    (['--dtype', 'f16', '--ckpt', 'CKPT'], 2, 'dtype'), (['--threads', '0', '--ckpt', 'CKPT'], 2, 'threads'),
    (['--ckpt', 'CKPT'], 2, 'no prompt')])
def test_what_a_user_gets_wrong_is_one_line(words, code, told, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / 'text.pt').write_text('not a checkpoint', encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['chat.py', *(checkpoint if word == 'CKPT' else word for word in words)])
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\n\n')))
    with pytest.raises(SystemExit) as stopped:
        chat.main()
    out, errors = capsys.readouterr()
    assert stopped.value.code == code and out == '' and told in errors.splitlines()[-1] and len(errors.splitlines()) <= 2


def test_without_a_compiler_it_says_so_once_and_goes_on(checkpoint, monkeypatch, capsys):
    """Sparse inference without its kernel fell back, silently, to a slower dense masked product."""
    def none(*_):
        raise build_kernel.KernelUnavailable('no C compiler found: install gcc')
    monkeypatch.setattr('build_kernel.load', none)
    monkeypatch.setattr(sys, 'argv', ['chat.py', '--ckpt', checkpoint, '--max-tokens', '3', '--temperature', '0'])
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'a\nb\n')))
    assert chat.main() == 0
    out, errors = capsys.readouterr()
    assert errors.count('PyTorch, which is slower') == 1 and errors.count('3 tokens') == 2 and out


class Session:
    """The program in a pseudo-terminal of 60 columns: send keys, wait for what it shows."""

    def __init__(self, *words, **environ):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 60, 0, 0))
        self.before, self.seen = termios.tcgetattr(self.ours), ''

        def own_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.run = subprocess.Popen([sys.executable, str(ROOT / 'chat.py'), *words], stdin=theirs, stdout=theirs, stderr=theirs,
                                    env={**ENVIRONMENT, **environ}, preexec_fn=own_terminal)
        os.close(theirs)

    def read(self, seconds):
        """More of what it shows; False where nothing came in time, or it is gone."""
        try:
            if select.select([self.ours], [], [], seconds)[0]:
                new = os.read(self.ours, 65536)
                self.seen += new.decode('utf-8', 'replace')
                return bool(new)
        except OSError:     # Linux: the other side was closed
            pass
        return False

    def keys(self, text, until):
        """Types text, and returns what is shown from then on until a pattern has been."""
        start = len(self.seen)
        os.write(self.ours, text.encode())
        end = time.time() + 60
        while not re.search(until, self.seen[start:]):
            assert time.time() < end and (self.read(5) or self.run.poll() is None), f'{until!r} never came: {self.seen[start:]!r}'
        return self.seen[start:]

    def leave(self):
        """-> the exit code, after reading to the end."""
        while self.read(5):
            pass
        return self.run.wait(20)


def test_a_session_at_a_terminal(checkpoint, tmp_path):
    """A prompt, commands, Ctrl-C in the middle of a reply, and Ctrl-D, as keys in a pseudo-terminal."""
    session = Session('--ckpt', checkpoint, '--max-tokens', '30', '--threads', '1', COLORTERM='truecolor')
    session.keys('', 'of dense\r\n.*> ')
    shown = session.keys('def f(n):\r', r'30 tokens, \d+/s, first \d+ ms; reduction [\d.]+ \([\d.]+% of dense\); f32, 1 thread[\s\S]*> ')
    assert '\x1b[38;2;' in shown
    assert re.search(r'layer 1.*head', session.keys('/layers\r', r'head[^\n]*\n[^\n]*> '), re.S)
    assert len(re.findall(r'\d\.\d\d\dx?', session.keys('/tokens\r', r' 30  [^\n]*\n[^\n]*> '))) >= 30
    assert re.search('sparse .* dense .* as fast', session.keys('/dense\r', r'as fast [\s\S]*> '))
    session.keys(f'/save {tmp_path}/a.html\r', r'wrote [\s\S]*> ')
    session.keys(f'/plot {tmp_path}/a.png\r', r'wrote [\s\S]*> ')
    assert (tmp_path / 'a.html').stat().st_size > 1000 and (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'
    session.keys('/save /nowhere/a.html\r', r'No such file[\s\S]*> ')
    session.keys('/plot\r', r'ends in .png[\s\S]*> ')
    session.keys('/ret\t\r', r'/retry[\s\S]*30 tokens[\s\S]*> ')
    session.keys('/help\r', r'/quit[\s\S]*> ')
    session.keys('/rest\r', r'did you mean /reset[\s\S]*> ')
    session.keys('/set temperature hot\r', r'needs a number[\s\S]*> ')
    session.keys('/set top_p 3\r', r'must be above 0[\s\S]*> ')
    session.keys('/set max_tokens 1000000\r', '> ')
    assert '1000000' in session.keys('/set\r', r'turn_template[^\n]*\n[^\n]*> ')
    session.keys('long\r', r'(48;2[\s\S]*?){20}')          # well into the reply
    shown = session.keys('\x03', r'\d+ tokens, [\s\S]*> ')
    last = re.findall(r'\x1b\[[0-9;]*m', shown)[-1]
    assert last == '\x1b[0m'
    session.keys('/reset\r', '> ')
    session.keys('\r', r'nothing to go on from[\s\S]*> ')
    session.keys('/layers\r', r'needs a reply first[\s\S]*> ')
    os.write(session.ours, b'\x04')
    assert session.leave() == 0 and 'Traceback' not in session.seen
    assert termios.tcgetattr(session.ours) == session.before


def test_ctrl_c_twice_leaves(checkpoint):
    session = Session('--ckpt', checkpoint, '--threads', '1', NO_COLOR='1')
    session.keys('', '> ')
    time.sleep(1)           # Python notices a Ctrl-C between drawing its prompt and waiting for keys only at the next key
    session.keys('\x03', 'once more[^\n]*\n[^\n]*> ')
    time.sleep(1)
    os.write(session.ours, b'\x03')
    assert session.leave() == 130 and 'Traceback' not in session.seen
    assert termios.tcgetattr(session.ours) == session.before
    assert not re.search(r'\x1b\[[0-9;]*m', session.seen)


def test_one_reply_on_a_terminal_is_drawn_on_its_colors(checkpoint):
    """The whole program on a terminal of 60 columns: the prompt's wide characters each stand on two cells of one colour."""
    session = Session('--ckpt', checkpoint, '--prompt', 'a日本b', '--max-tokens', '50', '--threads', '1', COLORTERM='truecolor')
    assert session.leave() == 0
    screen = Screen(60, 24)
    screen.feed(session.seen)
    line = next(line for line in screen.lines() if ''.join(char for char, _ in line).startswith('a日本b'))
    assert [char for char, _ in line[:6]] == ['a', '日', '', '本', '', 'b'] and line[0][1] is None
    model, saved = cwic.load_checkpoint(checkpoint)
    with torch.no_grad():
        active = model(torch.tensor([list('a日本b'.encode())]))[1]          # (M, 1, T)
    shares = active[:, 0].sum(0) / model.dense()        # of the pass over each byte
    palette = render.Palette('truecolor', *(saved['compute_percentiles'][p] for p in ('5', '95')))
    assert [back for _, back in line[1:6]] == [palette.rgb(float(shares[i])) for i in (2, 2, 5, 5, 6)]
