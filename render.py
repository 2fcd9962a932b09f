"""
How a conversation looks: its colours, the stream on a terminal, tables, JSON, a page, and pictures.

    palette = Palette('truecolor', low=0.25, high=0.42)     # shares of dense compute at the scale's ends
    painter = Painter(sys.stdout, palette, columns=lambda: 80)
    painter.write('def', share=0.31)                        # its background says: 31% of the dense weights

The scale runs from a light peach (little compute) to a dark purple (much), in steps that look equal.
Lightness alone tells them apart, for colour-blind eyes and grey printers. Text on it is black or white,
whichever contrasts more, so it reads equally well on dark and on light terminals.

A turn is a conversation.Turn, and a token a conversation.Token.

Not here: 16-colour terminals (they get plain text), right-to-left layout.
"""

import html
import json
import math
import re
import unicodedata
import warnings
from itertools import groupby
from string import Template
from typing import NamedTuple

import numpy as np

from files import write_atomically
from plots import heat_map, picture, scale_color, text_color

# the scale on a 256-colour terminal: each step is darker than the one before, and about as vivid
RAMP_256 = (223, 181, 139, 132, 125, 90, 53)
LONGEST_WORD = 30       # characters; a longer word is shown before it is complete
RESET, ERASE_LINE, DIM = '\x1b[0m', '\x1b[K', '\x1b[2m'
# characters that terminals and pages obey: control characters, and those that reverse the text
CONTROLS = re.compile('[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]')
COUNTED = {'read': 'the pass over each token', 'predicted': 'the pass that predicted each token'}

# -----------------------------------------------------------------------------
# colours


def color_mode(stream, environ):
    """'truecolor', '256' or 'none': what the terminal behind a stream says it can show."""
    term = environ.get('TERM', '')
    if not stream.isatty() or environ.get('NO_COLOR') or term == 'dumb':
        return 'none'
    if environ.get('COLORTERM') in ('truecolor', '24bit') or 'WT_SESSION' in environ or '-direct' in term:
        return 'truecolor'
    return '256' if re.search('256color|xterm|screen|tmux|rxvt|alacritty|foot', term) else 'none'


class Palette:
    """
    Shares of dense compute as colours. mode: see color_mode; low, high: the shares at the scale's ends, or
    None for a dense model, which needs no colours.
    """

    def __init__(self, mode, low, high):
        self.mode, self.low, self.high = mode, low, high

    def position(self, share):
        """A share's place on the scale, from 0 to 1; None if it has none."""
        if share is not None and self.low is not None:
            return min(max((share - self.low) / (self.high - self.low), 0), 1)

    def rgb(self, share):
        """The background of a share, or None."""
        position = self.position(share)
        return None if position is None else scale_color(position)

    def codes(self, share):
        """The escape codes that switch on a share's colours."""
        position = self.position(share)
        if position is None or self.mode == 'none':
            return ''
        if self.mode == '256':
            step = round(position * (len(RAMP_256) - 1))
            return f'\x1b[38;5;{16 if step <= 3 else 231};48;5;{RAMP_256[step]}m'
        back = scale_color(position)
        return '\x1b[38;2;{};{};{};48;2;{};{};{}m'.format(*text_color(back), *back)

    def paint(self, text, share):
        """text, of one line, in a share's colours."""
        codes = self.codes(share)
        return codes + text + RESET if codes else text

    def legend(self, color_by):
        """A line that says what the colours mean: [(text, share)]."""
        if self.low is None:
            return [('this model is dense: every token uses every weight', None)]
        steps = [(' ', self.low + (self.high - self.low) * i / 8) for i in range(9)]
        return [(f'% of weights used by {COUNTED[color_by]}: <{100 * self.low:.1f} ', None), *steps,
                (f' >{100 * self.high:.1f}', None)]


# -----------------------------------------------------------------------------
# text on a terminal


def text_width(text):
    """Columns that text takes in a terminal."""
    return sum(0 if unicodedata.category(char) in ('Mn', 'Me', 'Cf') else
               2 if unicodedata.east_asian_width(char) in 'WF' else 1 for char in text)


def visible(text):
    """Text with symbols for its control characters: what a model says must not steer the terminal."""
    def symbol(match):
        code = ord(match[0])
        return chr(0x2400 + code) if code < 32 else '\u2421' if code == 127 else '\ufffd'
    return CONTROLS.sub(symbol, text)


class Placed(NamedTuple):
    """A character on a terminal."""
    row: int
    column: int
    shown: str          # what stands for it there
    style: object       # anything that goes with it


class Layout:
    """
    Places text as a terminal does, columns() wide, but breaks lines at blanks and around wide characters, not
    within words. The last word waits until it is complete: a token to come may make it too long for the line.
    """

    def __init__(self, columns):
        self.columns, self.row, self.column, self.word = columns, 0, 0, []

    def feed(self, text, style):
        """-> a list of Placed, for the words that are complete"""
        placed = []
        for char in text:
            before = self.word[-1][0] if self.word else ''
            if before and (char.isspace() or 2 in (text_width(before), text_width(char))
                           or len(self.word) == LONGEST_WORD):
                placed += self.end_word()
            self.word.append((char, style))
        return placed

    def end_word(self):
        """-> the same for the word that waits; if it does not fit, a new line takes the place of its blank"""
        word, placed, columns = self.word, [], self.columns()
        self.word = []
        text = ''.join(char for char, _ in word)
        too_long = self.column + text_width(text) > columns >= text_width(text)
        if too_long and text[0] == ' ' and not text.isspace():
            text = '\n' + text[1:]
        for char, (_, style) in zip(text, word):
            if char == '\n':
                placed.append(Placed(self.row, self.column, '\n', style))
                self.row, self.column = self.row + 1, 0
                continue
            # a tab becomes blanks: terminals leave what it skips unpainted
            shown = ' ' * min(8 - self.column % 8, columns - self.column) if char == '\t' else visible(char)
            if self.column + text_width(shown) > columns:
                self.row, self.column = self.row + 1, 0
            placed.append(Placed(self.row, self.column, shown, style))
            self.column += text_width(shown)
        return placed


class Painter:
    """
    Writes text to a terminal, each piece on the colour of its share of dense compute; columns() is its width.
    Colours end before every newline and after every write, so that none outlives an interrupt.
    """

    def __init__(self, out, palette, columns):
        self.out, self.palette, self.layout = out, palette, Layout(columns)

    def write(self, text, share):
        self.paint(self.layout.feed(text, share))

    def end_line(self):
        """Writes the word that waits, and moves to the start of a line, unless there."""
        if self.layout.word:
            self.paint(self.layout.end_word())
        if self.layout.column:
            self.out.write('\n')
            self.layout.column = 0

    def paint(self, placed):
        def codes_at(at):
            return '' if at.shown == '\n' else self.palette.codes(at.style)

        parts = []
        for codes, run in groupby(placed, codes_at):
            parts.append(codes)
            for at in run:
                parts.append(at.shown)
                if codes and at.column == 0:
                    # terminals fill a line that scrolls into view with the current background: empty it
                    parts.append(RESET + ERASE_LINE + codes)
            if codes:
                parts.append(RESET)
        self.out.write(''.join(parts))
        self.out.flush()


# -----------------------------------------------------------------------------
# numbers: a line, tables, JSON


def reduction(share):
    return 1 / share if share else math.inf


def surprise(token):
    """-log probability, in nats."""
    return -math.log(max(token.probability, 1e-45))


def summary(turn):
    """The line after a reply."""
    if not turn.reply:
        return f'0 tokens; {turn.engine}'
    speed = f', {turn.speed:.0f}/s' if turn.speed else ''
    return (f'{len(turn.reply)} tokens{speed}, first {1000 * sum(turn.seconds[:2]):.0f} ms; '
            f'used {100 * turn.share:.1f}%, reduction {reduction(turn.share):.2f}; {turn.engine}')


def quoted(piece):
    """A token's bytes on one line, as Python writes them, without the quotes."""
    try:
        return repr(piece.decode('utf-8'))[1:-1]
    except UnicodeDecodeError:
        return repr(piece)[2:-1]


def cell(piece, width):
    """The same in exactly width columns."""
    text = quoted(piece)
    text = text if text.strip() else text.replace(' ', '\u2423')
    while text_width(text) > width:
        text = text[:-1]
    return text + ' ' * (width - text_width(text))


def token_table(turn, palette):
    """The reply's tokens, a line for each."""
    lines = [f'compute of {COUNTED[turn.config.color_by]}; surprise, in nats, at the token',
             '   #  token                   active reduction of dense probability surprise']
    for i, token in enumerate(turn.reply):
        lines.append(f'{i + 1:>4}  {palette.paint(cell(token.piece, 18), token.share)} '
                     f'{token.active.sum():>11,} {reduction(token.share):>8.2f}x {100 * token.share:>7.1f}% '
                     f'{token.probability:>11.4f} {surprise(token):>8.2f}')
    return '\n'.join(lines)


def mean_shares(turn):
    """The share of each matrix's weights that a reply used, on average: a list (M)."""
    return (sum(token.active for token in turn.reply) / len(turn.reply) / turn.decoder.n_weights).tolist()


def layer_map(turn, mode):
    """A table, layer by matrix: the percentage of its weights that the reply used."""
    palette, names, shares = Palette(mode, 0, 1), turn.decoder.config.matrices, mean_shares(turn)
    lines = ['% of weights used' + ''.join(f'{name:>8}' for name in names)]
    for i in range(0, len(shares), len(names)):
        label = f'layer {i // len(names)}' if i + 1 < len(shares) else 'head'
        row = ''.join(palette.paint(f'{100 * share:>7.1f} ', share) for share in shares[i:i + len(names)])
        lines.append(f'{label:>17}{row}')
    return '\n'.join(lines)


def as_json(turn):
    """A turn as a line of JSON. Control characters are escaped; numbers that are not finite become null."""
    def finite(number):
        return number if number is not None and math.isfinite(number) else None

    text = json.dumps(dict(
        prompt=turn.typed, text=turn.text, ended=turn.ended, tokens=[token.id for token in turn.reply],
        probabilities=[finite(token.probability) for token in turn.reply],
        counted=COUNTED[turn.config.color_by],
        matrices=turn.decoder.names, dense=turn.decoder.n_weights.tolist(),
        active=[token.active.tolist() for token in turn.reply],             # [token][matrix]
        reduction=finite(reduction(turn.share)), share_of_dense=turn.share,
        first_token_seconds=sum(turn.seconds[:2]), other_tokens_seconds=sum(turn.seconds[2:]),
        tokens_per_second=turn.speed, engine=turn.engine), ensure_ascii=False, allow_nan=False)
    return CONTROLS.sub(lambda match: f'\\u{ord(match[0]):04x}', text)


# -----------------------------------------------------------------------------
# a page and pictures; all raise OSError


PAGE = Template('''<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Where the compute goes</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.6 ui-monospace, Consolas, monospace; max-width: 60em; margin: 2em auto; padding: 0 1em; }
pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }
span:hover { outline: 2px solid orange; }
.prompt { font-weight: bold; }
.quiet { opacity: .75; font-size: 14px; }
</style>
<h1>Where the compute goes</h1>
<pre class="quiet">$legend
Point at a token for its numbers. What was typed is bold.</pre>
$turns
</html>
''')


def save_page(turns, palette, path):
    """Writes a conversation as one HTML file; pointing at a token shows its numbers."""
    def span(kind, text, share, tip=''):
        back = palette.rgb(share)
        style = f' style="background:rgb{back};color:rgb{text_color(back)}"' if back else ''
        shown = html.escape(''.join(char if char in '\n\t' else visible(char) for char in text))
        return f'<span class="{kind}" title="{html.escape(tip)}"{style}>{shown}</span>'

    def tip(token):
        said = '' if token.probability is None else f'\nsurprise {surprise(token):.2f} nats'
        return (f'{cell(token.piece, 24).rstrip()}\n{token.active.sum():,} active weights\n'
                f'{100 * token.share:.1f}% of dense, reduction {reduction(token.share):.2f}x{said}')

    body = ''
    for turn in turns:
        spans = (span(kind, text, token.share, tip(token)) if token and token.share is not None
                 else span(kind, text, None) for kind, text, token in turn.shown)
        # a <pre> swallows a newline that opens it
        body += f'<pre>\n{"".join(spans)}</pre>\n<p class="quiet">{html.escape(summary(turn))}</p>\n'
    legend = ''.join(span('scale', *piece) for piece in palette.legend(turns[-1].config.color_by))
    page = PAGE.substitute(legend=legend, turns=body)
    write_atomically(path, lambda file: file.write(page.encode()))


def save_picture(turns, palette, path, columns=80):
    """
    Draws a conversation as on a dark terminal, what was typed in bold; of a long one the last 1,000 lines.
    Characters that matplotlib's font lacks are boxes.
    """
    pieces = [('remark', *piece) for piece in palette.legend(turns[-1].config.color_by)]
    pieces.append(('remark', '\n\n', None))
    for turn in turns:
        pieces += [(kind, text, token and token.share) for kind, text, token in turn.shown]
        pieces.append(('remark', f'\n{summary(turn)}\n\n', None))
    layout, placed = Layout(lambda: columns), []
    for kind, text, share in pieces:
        placed += layout.feed(text, (kind, share))
    placed += layout.end_word()
    top = max(layout.row - 1000, 0)
    width, height = columns * 0.084, (layout.row - top + 1) * 0.175
    with warnings.catch_warnings(), picture(path, width, height) as (figure, axes):
        warnings.simplefilter('ignore')             # about characters that the font lacks
        figure.set_layout_engine('none')
        figure.set_facecolor('#18181a')
        axes.set_position((0.015, 0, 0.97, 1))
        axes.set(xlim=(0, columns), ylim=(layout.row + 0.5, top - 0.5))
        axes.axis('off')
        for (row, (kind, share)), run in groupby(placed, lambda at: (at.row, at.style)):
            first, *rest = run
            text = ''.join(at.shown for at in (first, *rest)).strip('\n')
            color, back = '0.6' if kind == 'remark' else '0.9', palette.rgb(share)
            if back:
                axes.barh(row, text_width(text), 1, first.column, color=np.array([back]) / 255)
                color = np.array(text_color(back)) / 255
            axes.text(first.column, row, text, color=color, family='monospace', size=9.7,
                      weight='bold' if kind == 'prompt' else 'normal',
                      va='center_baseline', clip_on=True, parse_math=False)


def plot_reply(turn, palette, path):
    """Draws one reply: the compute of each token, and the share of each matrix's weights that was used."""
    percent = np.array([100 * token.share for token in turn.reply])
    number = range(1, len(percent) + 1)
    with picture(path, columns=2, width_ratios=(2, 1)) as (_, (left, right)):
        left.plot(number, percent, color='0.8', lw=0.8, zorder=1)
        left.scatter(number, percent, s=20, ec='0.4', lw=0.5,
                     color=np.array([palette.rgb(token.share) or (128,) * 3 for token in turn.reply]) / 255)
        left.axhline(percent.mean(), color='0.3', lw=1, ls='--', label=f'mean: {percent.mean():.1f}%')
        left.set(title=f'Compute of {COUNTED[turn.config.color_by]}', xlabel='token of the reply',
                 ylabel='active weights, % of dense')
        left.legend()
        heat_map(right, mean_shares(turn), turn.decoder.config.matrices)
        right.set(title='Weights used, % of each matrix')
