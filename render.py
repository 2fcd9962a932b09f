"""
How a conversation is shown: colours, the stream of a terminal, tables, JSON, a page. plots.py draws pictures.

    palette = Palette('truecolor', low=0.25, high=0.42)     # the shares of dense at the ends of the scale
    painter = Painter(sys.stdout, palette, columns=lambda: 80)
    painter.write('def', share=0.31)                        # its background says: 31% of the dense weights

The scale goes from a light peach (little compute) to a dark purple (much) in steps that look equal. Lightness
alone tells them apart, for colour-blind eyes and grey printers; text on it is black or white, whichever
contrasts more, so that it reads alike on dark and on light terminals.

Wherever it is asked for, a turn is a conversation.Turn and a token a conversation.Token.

Not here: 16-colour terminals (they get plain text), right-to-left layout.
"""

import html
import json
import math
import re
import unicodedata
from string import Template

LIGHT, DARK = (255, 234, 201), (100, 13, 100)
# the scale on a 256-colour terminal: each step is darker than the one before, and hardly any less vivid
RAMP_256 = (223, 181, 139, 132, 125, 90, 53)
LONGEST_WORD = 30       # characters; longer ones are not waited for
RESET, ERASE_LINE, DIM = '\x1b[0m', '\x1b[K', '\x1b[2m'
# what terminals and pages obey: control characters, and those that turn text round
CONTROLS = re.compile('[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]')
COUNTED = {'read': 'the pass over each token', 'predicted': 'the pass that predicted each token'}

# -----------------------------------------------------------------------------
# colours


def scale_color(position):
    """position from 0 (light, little compute) to 1 (dark, much) -> (red, green, blue), 0 to 255."""
    return tuple(round(light + (dark - light) * min(max(position, 0), 1)) for light, dark in zip(LIGHT, DARK))


def text_color(rgb):
    """Black or white, whichever is easier to read on a colour of the scale."""
    return (0, 0, 0) if 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 119 else (255, 255, 255)


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

    def rgb(self, share):
        """The background of a share; None where there is none."""
        if share is not None and self.low is not None:
            return scale_color((share - self.low) / (self.high - self.low))

    def paint(self, text, share):
        """text, of one line, in the colours of share."""
        on = self.codes(share)
        return on + text + RESET if on else text

    def codes(self, share):
        """The codes that switch on the colours of a share."""
        back = self.rgb(share)
        if self.mode == 'none' or back is None:
            return ''
        if self.mode == '256':
            position = min(max((share - self.low) / (self.high - self.low), 0), 1)
            step = round(position * (len(RAMP_256) - 1))
            return f'\x1b[38;5;{16 if step <= 3 else 231};48;5;{RAMP_256[step]}m'
        return '\x1b[38;2;{};{};{};48;2;{};{};{}m'.format(*text_color(back), *back)

    def legend(self, color_by):
        """A line that says what the colours mean: [(text, share)]."""
        if self.low is None:
            return [('this model is dense: every token uses every weight', None)]
        steps = [(' ', self.low + (self.high - self.low) * i / 8) for i in range(9)]
        return [(f'% of weights used by {COUNTED[color_by]}: <{100 * self.low:.1f} ', None), *steps,
                (f' >{100 * self.high:.1f}', None)]


# -----------------------------------------------------------------------------
# the stream


def text_width(text):
    """Columns that text takes in a terminal."""
    return sum(0 if unicodedata.category(char) in ('Mn', 'Me', 'Cf') else
               2 if unicodedata.east_asian_width(char) in 'WF' else 1 for char in text)


def visible(text):
    """Text with pictures of its control characters: what a model says must not steer the terminal."""
    def picture(match):
        code = ord(match[0])
        return chr(0x2400 + code) if code < 32 else '\u2421' if code == 127 else '\ufffd'
    return CONTROLS.sub(picture, text)


def words(chars):
    """
    Cuts text, [(character, share)], where a line may break: before blanks, and around wide characters. A word
    is a list of the same, its blank included.
    """
    cut = [[]]
    for char, share in chars:
        before = cut[-1][-1][0] if cut[-1] else ''
        if before and (char.isspace() or text_width(char) == 2 or text_width(before) == 2
                       or len(cut[-1]) == LONGEST_WORD):
            cut.append([])
        cut[-1].append((char, share))
    return cut


def flow(word, column, columns):
    """
    How a terminal of so many columns shows a word from a column on: for each character what it becomes,
    whether it is on a new line, the column after it, and its share. A word that does not fit gets a new line
    in place of its blank. A tab becomes blanks: terminals leave what a real one skips unpainted.
    """
    text = ''.join(char for char, _ in word)
    if text[:1] == ' ' and not text.isspace() and column + text_width(text) > columns >= text_width(text):
        text = '\n' + text[1:]
    for char, (_, share) in zip(text, word):
        if char == '\n':
            shown, wraps, column = '\n', True, 0
        else:
            shown = ' ' * min(8 - column % 8, columns - column) if char == '\t' else visible(char)
            wraps = column + text_width(shown) > columns
            column = text_width(shown) + (0 if wraps else column)
        yield shown, wraps, column, share


class Painter:
    """
    Writes text to a terminal, each piece on the colour of its share of dense compute; columns() is its width.
    The last word waits until it is whole, as a word of several tokens would break at the right margin.
    Colours end before every newline and after every write, so that none outlives an interrupt.
    """

    def __init__(self, out, palette, columns):
        self.out, self.palette, self.columns, self.column, self.waiting = out, palette, columns, 0, []

    def write(self, text, share):
        *whole, self.waiting = words(self.waiting + [(char, share) for char in text])
        self.paint(whole)

    def paint(self, whole):
        parts, on = [], ''
        for word in whole:
            for shown, wraps, self.column, share in flow(word, self.column, self.columns()):
                codes = self.palette.codes(share)
                if codes != on:
                    parts.append((RESET if on else '') + codes)
                    on = codes
                if shown == '\n':
                    shown = (RESET if on else '') + '\n' + on
                elif wraps and on:
                    # a line that scrolls into view is filled with the background of the moment: empty it
                    shown += RESET + ERASE_LINE + on
                parts.append(shown)
        self.out.write(''.join(parts) + (RESET if on else ''))
        self.out.flush()

    def end_line(self):
        """Writes the word that waits, and moves to the start of a line, unless there."""
        if self.waiting:
            word, self.waiting = self.waiting, []
            self.paint([word])
        if self.column:
            self.out.write('\n')
            self.column = 0


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
    """The reply's tokens as lines."""
    lines = [f'compute of {COUNTED[turn.config.color_by]}; surprise, in nats, at the token',
             '   #  token                   active reduction of dense probability surprise']
    for i, token in enumerate(turn.reply):
        lines.append(f'{i + 1:>4}  {palette.paint(cell(token.piece, 18), token.share)} '
                     f'{token.active.sum():>11,} {reduction(token.share):>8.2f}x {100 * token.share:>7.1f}% '
                     f'{token.probability:>11.4f} {surprise(token):>8.2f}')
    return lines


def mean_shares(turn):
    """The share of its weights that each matrix used, a list (M): the mean over a reply."""
    return (sum(token.active for token in turn.reply) / len(turn.reply) / turn.decoder.n_weights).tolist()


def layer_map(turn, mode):
    """Lines of a map, layer x matrix: the percentage of its weights that the reply used."""
    palette, names, shares = Palette(mode, 0, 1), turn.decoder.config.matrices, mean_shares(turn)
    lines = ['% of weights used' + ''.join(f'{name:>8}' for name in names)]
    for i in range(0, len(shares), len(names)):
        label = f'layer {i // len(names)}' if i + 1 < len(shares) else 'head'
        row = ''.join(palette.paint(f'{100 * share:>7.1f} ', share) for share in shares[i:i + len(names)])
        lines.append(f'{label:>17}{row}')
    return lines


def as_json(turn):
    """A turn as a line of JSON. What a terminal obeys is escaped, and what is not finite is null."""
    def finite(number):
        return number if number is not None and math.isfinite(number) else None

    text = json.dumps(dict(
        prompt=turn.typed, text=turn.text, ended=turn.ended, tokens=[token.id for token in turn.reply],
        probabilities=[finite(token.probability) for token in turn.reply],
        counted=COUNTED[turn.config.color_by], matrices=turn.decoder.names, dense=turn.decoder.n_weights.tolist(),
        active=[token.active.tolist() for token in turn.reply],             # [token][matrix]
        reduction=finite(reduction(turn.share)), share_of_dense=turn.share,
        first_token_seconds=sum(turn.seconds[:2]), other_tokens_seconds=sum(turn.seconds[2:]),
        tokens_per_second=turn.speed, engine=turn.engine), ensure_ascii=False, allow_nan=False)
    return CONTROLS.sub(lambda match: f'\\u{ord(match[0]):04x}', text)


# -----------------------------------------------------------------------------
# the page


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
    """Writes a conversation as one HTML file; pointing at a token shows its numbers. Raises OSError."""
    def span(kind, text, share, tip=''):
        back = palette.rgb(share)
        style = f' style="background:rgb{back};color:rgb{text_color(back)}"' if back else ''
        # newlines and tabs are the page's; all else is shown as a terminal would show it
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
    with open(path, 'w', encoding='utf-8') as f:
        f.write(PAGE.substitute(legend=legend, turns=body))
