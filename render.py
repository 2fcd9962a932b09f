"""
How a conversation looks: its colours, the stream on a terminal, tables, JSON, a page, and pictures.

    palette = Palette(low=0.25, high=0.42)          # shares of dense compute at the scale's ends
    painter = Painter(sys.stdout, palette, columns=lambda: 80)
    painter.write('def', share=0.31)                # its background says: 31% of the dense weights

The scale runs from a light peach (little compute) to a dark purple (much), in steps that look equal.
Lightness alone tells them apart, for colour-blind eyes and grey printers. Text on it is black or white,
whichever contrasts more, so it reads equally well on dark and on light terminals.

A turn is a conversation.Turn, and a token a conversation.Token.

Not here: terminals of other than 256 colours (any newer one has these), right-to-left layout.
"""

import html
import json
import math
import re
import unicodedata
import warnings
from string import Template

import numpy as np

from files import write_atomically
from plots import heat_map, picture, scale_color, text_color

# the scale on a terminal: each step is darker than the one before, and about as vivid
RAMP_256 = (223, 181, 139, 132, 125, 90, 53)
RESET, DIM = '\x1b[0m', '\x1b[2m'
# characters that terminals and pages obey: control characters, and those that reverse the text
CONTROLS = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]')

# -----------------------------------------------------------------------------
# colours


class Palette:
    """
    Shares of dense compute as colours. low, high: the shares at the scale's ends; colored: whether the
    terminal gets any.
    """

    def __init__(self, low, high, colored=True):
        self.low, self.high, self.colored = low, high, colored

    def position(self, share):
        """A share's place on the scale, from 0 to 1."""
        return min(max((share - self.low) / max(self.high - self.low, 1e-3), 0), 1)

    def rgb(self, share):
        return scale_color(self.position(share))

    def paint(self, text, share):
        """text, of one line, for a terminal: on the colour of a share, or as it is if that is None."""
        if share is None or not text or not self.colored:
            return text
        step = round(self.position(share) * (len(RAMP_256) - 1))
        return f'\x1b[38;5;{16 if step <= 3 else 231};48;5;{RAMP_256[step]}m{text}{RESET}'

    def legend(self):
        """A line that says what the colours mean: [(text, share)]."""
        steps = [(' ', self.low + (self.high - self.low) * i / 6) for i in range(7)]
        return [(f'% of weights used for each token: <{100 * self.low:.1f} ', None), *steps,
                (f' >{100 * self.high:.1f}', None)]


# -----------------------------------------------------------------------------
# text on a terminal


def text_width(text):
    """Columns that text takes in a terminal."""
    return sum(0 if unicodedata.category(char) in ('Mn', 'Me', 'Cf') else
               2 if unicodedata.east_asian_width(char) in 'WF' else 1 for char in text)


def visible(text):
    """Text without its control characters: what a model says must not steer the terminal."""
    return CONTROLS.sub('\ufffd', text)


class Layout:
    """
    Lines of text, columns() wide. A word that does not fit begins a new line, in place of its blank. The last
    two columns are left to what may come right after it, such as a full stop.
    """

    def __init__(self, columns):
        self.columns, self.row, self.column = columns, 0, 0

    def feed(self, text):
        """-> [[row, column, text]]: a piece on each line, the first one where the last text ended"""
        columns, pieces = self.columns(), [[self.row, self.column, '']]
        for word in re.findall(' ?[^ \n]+|[ \n]', visible(text).replace('\t', '    ')):
            if word[0] == ' ' and self.column + text_width(word) > columns - 2:
                word = '\n' + word[1:]
            for char in word:
                width = text_width(char)
                if char == '\n' or self.column + width > columns:
                    self.row, self.column = self.row + 1, 0
                    pieces.append([self.row, 0, ''])
                if char != '\n':
                    pieces[-1][2] += char
                    self.column += width
        return pieces


class Painter:
    """
    Writes text to a terminal, each piece on the colour of its share of dense compute; columns() is its width.
    It breaks lines itself: a terminal would fill a line that scrolls into view with the current background.
    """

    def __init__(self, out, palette, columns):
        self.out, self.palette, self.layout = out, palette, Layout(columns)

    def write(self, text, share):
        self.out.write('\n'.join(self.palette.paint(line, share) for _, _, line in self.layout.feed(text)))
        self.out.flush()

    def end_line(self):
        """Moves to the start of a line, unless there."""
        if self.layout.column:
            self.write('\n', None)


# -----------------------------------------------------------------------------
# numbers: a line, tables, JSON


def reduction(share):
    return 1 / share if share else math.inf


def surprise(token):
    """-log probability, in nats."""
    return -math.log(max(token.probability, 1e-45))


def quoted(piece):
    """A token's bytes on one line, as Python writes a string."""
    return repr(piece.decode('utf-8', 'replace'))


def summary(turn):
    """The line after a reply."""
    if not turn.reply:
        return f'0 tokens; {turn.engine}'
    speed = f', {turn.speed:.0f}/s' if turn.speed else ''
    count = f'{len(turn.reply)} token{"s" * (len(turn.reply) > 1)}'
    return (f'{count}{speed}, first {1000 * sum(turn.seconds[:2]):.0f} ms; '
            f'used {100 * turn.share:.1f}%, reduction {reduction(turn.share):.2f}; {turn.engine}')


def token_table(turn, palette):
    """The reply's tokens, a line for each."""
    lines = ['   #  token                active weights  % of dense  surprise, nats']
    for i, token in enumerate(turn.reply):
        piece = palette.paint(f'{quoted(token.piece)[:20]:<20}', token.share)
        lines.append(f'{i + 1:>4}  {piece} {token.active.sum():>14,} {100 * token.share:>11.1f} '
                     f'{surprise(token):>15.2f}')
    return '\n'.join(lines)


def mean_shares(turn):
    """The share of each matrix's weights that a reply used, on average: a list (M)."""
    return (sum(token.active for token in turn.reply) / len(turn.reply) / turn.decoder.n_weights).tolist()


def layer_map(turn, colored):
    """A table, layer by matrix: the percentage of its weights that the reply used."""
    palette, names, shares = Palette(0, 1, colored), turn.decoder.config.matrices, mean_shares(turn)
    lines = ['% of weights used' + ''.join(f'{name:>8}' for name in names)]
    for i in range(0, len(shares), len(names)):
        label = f'layer {i // len(names)}' if i + 1 < len(shares) else 'head'
        row = ''.join(palette.paint(f'{100 * share:>7.1f} ', share) for share in shares[i:i + len(names)])
        lines.append(f'{label:>17}{row}')
    return '\n'.join(lines)


def as_json(turn):
    """
    A turn as a line of JSON. prompt and text; ended: by the model's 'end', by a 'stop' sequence, by 'length'
    or an 'interrupt'; of the reply, tokens (ids) and their probabilities; the names of the matrices, their
    weights when dense, and how many of these each token of the reply used (active); share_of_dense, the mean
    of that over tokens, and 1 / it, reduction; seconds up to the first token, prompt included, and for the
    others.
    """
    return json.dumps(dict(
        prompt=turn.typed, text=turn.text, ended=turn.ended, tokens=[token.id for token in turn.reply],
        probabilities=[token.probability for token in turn.reply],
        matrices=turn.decoder.names, dense=turn.decoder.n_weights.tolist(),
        active=[token.active.tolist() for token in turn.reply],             # [token][matrix]
        reduction=1 / turn.share if turn.share else None, share_of_dense=turn.share,
        first_token_seconds=sum(turn.seconds[:2]), other_tokens_seconds=sum(turn.seconds[2:]),
        tokens_per_second=turn.speed, engine=turn.engine))


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
        style = ''
        if share is not None:
            back = palette.rgb(share)
            style = f' style="background:rgb{back};color:rgb{text_color(back)}"'
        return f'<span class="{kind}" title="{html.escape(tip)}"{style}>{html.escape(visible(text))}</span>'

    def tip(token):
        said = '' if token.probability is None else f'\nsurprise {surprise(token):.2f} nats'
        return (f'{quoted(token.piece)}\n{token.active.sum():,} active weights\n'
                f'{100 * token.share:.1f}% of dense, reduction {reduction(token.share):.2f}x{said}')

    body = ''
    for turn in turns:
        spans = (span(kind, text, token.share, tip(token)) if token else span(kind, text, None)
                 for kind, text, token in turn.shown)
        # a <pre> swallows a newline that opens it
        body += f'<pre>\n{"".join(spans)}</pre>\n<p class="quiet">{html.escape(summary(turn))}</p>\n'
    legend = ''.join(span('scale', *piece) for piece in palette.legend())
    page = PAGE.substitute(legend=legend, turns=body)
    write_atomically(path, lambda file: file.write(page.encode()))


def save_picture(turns, palette, path, columns=80):
    """
    Draws a conversation as on a dark terminal, what was typed in bold. Characters that matplotlib's font
    lacks are boxes.
    """
    said = [('remark', *piece) for piece in palette.legend()]
    for turn in turns:
        said.append(('remark', '\n\n', None))
        said += [(kind, text, token and token.share) for kind, text, token in turn.shown]
        said.append(('remark', f'\n{summary(turn)}', None))
    layout = Layout(lambda: columns)
    pieces = [(kind, share, *piece) for kind, text, share in said for piece in layout.feed(text)]
    width, height = columns * 0.084, (layout.row + 1) * 0.175
    with warnings.catch_warnings(), picture(path, width, height) as (figure, axes):
        warnings.simplefilter('ignore')             # about characters that the font lacks
        figure.set_layout_engine('none')
        figure.set_facecolor('#18181a')
        axes.set_position((0.015, 0, 0.97, 1))
        axes.set(xlim=(0, columns), ylim=(layout.row + 0.5, -0.5))
        axes.axis('off')
        for kind, share, row, column, text in pieces:
            color = '0.6' if kind == 'remark' else '0.9'
            if share is not None:
                back = palette.rgb(share)
                axes.barh(row, text_width(text), 1, column, color=np.array([back]) / 255)
                color = np.array(text_color(back)) / 255
            axes.text(column, row, text, color=color, family='monospace', size=9.7,
                      weight='bold' if kind == 'prompt' else 'normal', va='center_baseline', parse_math=False)


def plot_reply(turn, palette, path):
    """Draws one reply: the compute of each token, and the share of each matrix's weights that was used."""
    percent = np.array([100 * token.share for token in turn.reply])
    number = range(1, len(percent) + 1)
    with picture(path, columns=2, width_ratios=(2, 1)) as (_, (left, right)):
        left.plot(number, percent, color='0.8', lw=0.8, zorder=1)
        left.scatter(number, percent, s=20, ec='0.4', lw=0.5,
                     color=np.array([palette.rgb(token.share) for token in turn.reply]) / 255)
        left.axhline(percent.mean(), color='0.3', lw=1, ls='--', label=f'mean: {percent.mean():.1f}%')
        left.set(title='Compute of each token', xlabel='token of the reply',
                 ylabel='active weights, % of dense')
        left.legend()
        heat_map(right, mean_shares(turn), turn.decoder.config.matrices)
        right.set(title='Weights used, % of each matrix')
