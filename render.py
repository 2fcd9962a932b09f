"""
How compute is shown: colours, the coloured stream of a terminal, tables, a page, a picture. chat.py decides what to show.

    palette = Palette('truecolor', low=0.25, high=0.42)     # the shares of dense at the ends of the scale
    painter = Painter(sys.stdout, palette, columns=lambda: 80)
    painter.write('def', share=0.31)                        # its background says: 31% of the dense weights

The scale is a straight line in OKLab, a space made so that equal steps look equal, from a light peach (little compute) to a
dark purple (much). Lightness alone tells them apart, so that colour-blind eyes and grey printers see the same order; the
text on it is black or white, whichever contrasts more, so that it reads alike on dark and on light terminals.

Wherever it is asked for, a turn is a conversation.Turn and a token a conversation.Token.

But: no 16-colour terminals (they get plain text), no right-to-left layout, widths of characters as Unicode's own tables say.
"""

import html
import unicodedata

import numpy as np

LIGHT, DARK = (0.95, 0.015, 0.05), (0.36, 0.13, -0.08)         # OKLab: lightness, green to red, blue to yellow
RAMP_256 = (223, 217, 181, 175, 139, 132, 96, 90, 53)           # the scale in what 256-colour terminals have, light to dark
RESET, ERASE_LINE, DIM = '\x1b[0m', '\x1b[K', '\x1b[2m'
MATRICES = ('qkv', 'out', 'up', 'down')                        # of each layer, in the order of every active count

# -----------------------------------------------------------------------------
# colours


def scale_color(position):
    """position from 0 (light, little compute) to 1 (dark, much) -> (red, green, blue), 0 to 255."""
    L, a, b = (x + (y - x) * min(max(position, 0.0), 1.0) for x, y in zip(LIGHT, DARK))
    # OKLab to linear sRGB: Ottosson, "A perceptual color space for image processing", 2020
    l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s = (L - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
              -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
              -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s)
    linear = [min(max(v, 0.0), 1.0) for v in linear]
    return tuple(round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in linear)


def luminance(rgb):
    """Relative luminance, from 0 to 1, as contrast is defined on (WCAG 2)."""
    linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def text_color(rgb):
    """Black or white, whichever is easier to read on rgb: the contrast is never less than 4.5 to 1."""
    return (0, 0, 0) if luminance(rgb) > 0.179 else (255, 255, 255)


def nearest_256(rgb):
    """rgb on the scale -> index and rgb of its like on a 256-colour terminal: that of RAMP_256 which is closest in lightness."""
    levels = (0, 95, 135, 175, 215, 255)        # of the 6 x 6 x 6 colours that begin at index 16
    ramp = [(i, tuple(levels[(i - 16) // step % 6] for step in (36, 6, 1))) for i in RAMP_256]
    return min(ramp, key=lambda color: abs(luminance(color[1]) ** (1 / 3) - luminance(rgb) ** (1 / 3)))


def color_mode(stream, environ):
    """'truecolor', '256' or 'none': what the terminal behind a stream says it can show."""
    term = environ.get('TERM', '')
    if not stream.isatty() or environ.get('NO_COLOR') or term == 'dumb':
        return 'none'
    if environ.get('COLORTERM') in ('truecolor', '24bit') or environ.get('WT_SESSION') or term.endswith('-direct'):
        return 'truecolor'
    return '256' if '256color' in term or term.startswith(('xterm', 'screen', 'tmux', 'rxvt', 'alacritty', 'foot')) else 'none'


class Palette:
    """Shares of dense compute as colours. mode: see color_mode; low, high: the shares at the light and the dark end."""

    def __init__(self, mode, low, high):
        self.mode, self.low, self.high = mode, low, max(high, low + 1e-6)

    def rgb(self, share):
        return scale_color((share - self.low) / (self.high - self.low))

    def sgr(self, share):
        """The codes that switch on the colours of a share; none without colours, or where no share is known (None)."""
        if self.mode == 'none' or share is None:
            return ''
        back = self.rgb(share)
        if self.mode == 'truecolor':
            return '\x1b[38;2;{};{};{};48;2;{};{};{}m'.format(*text_color(back), *back)
        index, back = nearest_256(back)
        return f'\x1b[38;5;{16 if text_color(back) == (0, 0, 0) else 231};48;5;{index}m'

    def paint(self, text, share):
        """text, of one line, in the colours of share."""
        codes = self.sgr(share)
        return codes + text + RESET if codes else text

    def legend(self):
        """One line that says what the colours mean."""
        steps = ''.join(self.paint(' ', self.low + (self.high - self.low) * i / 23) for i in range(24))
        return f'compute per token: {100 * self.low:.1f}% {steps} {100 * self.high:.1f}% of dense'


# -----------------------------------------------------------------------------
# the stream


def char_width(char):
    """Columns that a character takes in a terminal: 0, 1 or 2."""
    if unicodedata.category(char) in ('Mn', 'Me', 'Cf'):
        return 0
    return 2 if unicodedata.east_asian_width(char) in 'WF' else 1


def visible(char):
    """A control character as a picture of it: what a model says must not steer the terminal."""
    code = ord(char)
    if code < 32:
        return chr(0x2400 + code)
    return '\u2421' if code == 127 else '\ufffd' if 128 <= code < 160 else char


class Painter:
    """
    Writes text to a terminal, each piece on the colour of its share of dense compute. columns: a function that returns the
    terminal's width. Colours are switched off before every newline and after every piece, so none outlives an interrupt.
    """

    def __init__(self, out, palette, columns):
        self.out, self.palette, self.columns, self.column = out, palette, columns, 0

    def write(self, text, share):
        on = self.palette.sgr(share)
        off = RESET if on else ''
        width, parts = self.columns(), [on]
        for char in text:
            if char == '\n':
                parts += [off, '\n', on]
                self.column = 0
                continue
            # a tab is drawn as blanks: terminals leave what a real one skips unpainted
            char = ' ' * min(8 - self.column % 8, width - self.column) if char == '\t' else visible(char)
            size = sum(map(char_width, char))
            wraps = self.column + size > width
            self.column = size if wraps else self.column + size
            parts.append(char)
            if wraps and on:
                # a line that scrolls into view on wrapping is filled with the background of the moment: empty its rest
                parts += [off, ERASE_LINE, on]
        self.out.write(''.join(parts) + off)
        self.out.flush()

    def end_line(self):
        """Moves to the start of a line, unless there."""
        if self.column:
            self.out.write('\n')
            self.column = 0


# -----------------------------------------------------------------------------
# tables


def quoted(piece, width):
    """A token's bytes on one line, cut to a number of columns."""
    text = repr(piece.decode('utf-8'))[1:-1] if is_utf8(piece) else repr(piece)[2:-1]
    text = text.replace(' ', '\u2423') if not text.strip() else text
    while sum(map(char_width, text)) > width:
        text = text[:-1]
    return text + ' ' * (width - sum(map(char_width, text)))


def is_utf8(piece):
    try:
        piece.decode('utf-8')
    except UnicodeDecodeError:
        return False
    return True


def token_table(turn, palette):
    """The reply's tokens as lines: number, token, active weights, reduction, share of dense, probability."""
    lines = [f'{"#":>4}  {"token":<20} {"active":>12} {"reduction":>10} {"of dense":>9} {"probability":>12}']
    for i, token in enumerate(turn.reply):
        lines.append(f'{i + 1:>4}  {palette.paint(quoted(token.piece, 20), token.share)} {token.active.sum():>12,} '
                     f'{token.reduction:>9.2f}x {100 * token.share:>8.1f}% {token.probability:>12.4f}')
    return lines


def layer_shares(turn):
    """Mean share of its weights that each matrix used over a reply -> (n_layer, 4), and the head's."""
    shares = np.mean([token.active for token in turn.reply], axis=0) / turn.dense
    return shares[:-1].reshape(-1, len(MATRICES)), shares[-1]


def layer_map(turn, mode):
    """Lines of a map, layer x matrix: the percentage of each matrix's weights that the reply used, on a scale from 0 to 100."""
    palette = Palette(mode, 0, 1)
    layers, head = layer_shares(turn)
    lines = ['% of weights used' + ''.join(f'{name:>7}' for name in MATRICES)]
    for i, row in enumerate(layers):
        lines.append(f'{f"layer {i}":>17}' + ''.join(palette.paint(f'{100 * share:>6.1f} ', share) for share in row))
    return lines + [f'{"head":>17}' + palette.paint(f'{100 * head:>6.1f} ', head)]


# -----------------------------------------------------------------------------
# the page


PAGE = '''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Where the compute goes</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
pre {{ font: 15px/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 8; }}
pre span {{ padding: .15em 0; }}
pre span.prompt {{ font-weight: bold; }}
pre span[data-tip]:hover {{ outline: 2px solid orange; }}
pre span[data-tip]:hover::after {{ content: attr(data-tip); position: fixed; right: 1em; bottom: 1em; padding: .5em 1em; background: #222;
  color: #fff; border: 1px solid #888; border-radius: 4px; white-space: pre; font: 15px/1.5 ui-monospace, Menlo, Consolas, monospace; }}
.scale {{ display: inline-block; width: 16em; height: 1em; vertical-align: -.1em; background: linear-gradient(to right, {ends}); }}
.quiet {{ opacity: .75; font-size: 14px; }}
</style>
</head>
<body>
<h1>Where the compute goes</h1>
<p>Compute per token: {low:.1f}% <span class="scale"></span> {high:.1f}% of dense.
Point at a token for its numbers; what was typed is bold.</p>
{turns}
</body>
</html>
'''


def save_page(turns, palette, path):
    """Writes a conversation as one HTML file that needs nothing else: pointing at a token shows its numbers."""
    def span(kind, text, token):
        if token.share is None:
            return f'<span class="{kind}">{html.escape(text)}</span>'
        back, active = palette.rgb(token.share), int(token.active.sum())
        tip = [quoted(token.piece, 24).rstrip(), f'{active:,} active weights',
               f'{100 * token.share:.1f}% of dense, reduction {token.reduction:.2f}x']
        tip += [] if token.probability is None else [f'probability {token.probability:.4f}']
        tip = html.escape('\n'.join(tip))
        return (f'<span class="{kind}" data-active="{active}" data-tip="{tip}" '
                f'style="background:rgb{back};color:rgb{text_color(back)}">{html.escape(text)}</span>')

    parts = []
    for turn in turns:
        # escape as a terminal would; a <pre> swallows a newline that opens it
        spans = ''.join(span(kind, ''.join(c if c in '\n\t' else visible(c) for c in text), token) for kind, text, token in turn.shown)
        parts.append(f'<pre>\n{spans}</pre>\n<p class="quiet">{html.escape(turn.summary())}</p>')
    ends = ', '.join(f'rgb{scale_color(i / 8)}' for i in range(9))
    with open(path, 'w', encoding='utf-8') as f:
        f.write(PAGE.format(low=100 * palette.low, high=100 * palette.high, ends=ends, turns='\n'.join(parts)))


# -----------------------------------------------------------------------------
# the picture


def plot(turn, palette, path):
    """A picture of one reply: compute per token along it, and the share of each matrix's weights that it used."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    colors = ListedColormap([tuple(v / 255 for v in scale_color(i / 255)) for i in range(256)])
    shares = np.array([100 * token.share for token in turn.reply])
    layers, head = layer_shares(turn)
    percent = 100 * np.concatenate([layers, np.full((1, len(MATRICES)), np.nan)])
    percent[-1, 0] = 100 * head

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 4.8), width_ratios=(2, 1))
    number = range(1, len(shares) + 1)
    left.plot(number, shares, color='0.8', lw=1, zorder=1)
    own = [tuple(v / 255 for v in palette.rgb(share / 100)) for share in shares]
    left.scatter(number, shares, s=30, color=own, edgecolor='0.4', lw=0.5)
    left.axhline(shares.mean(), color='0.3', lw=1, ls='--', label=f'mean: {shares.mean():.1f}%')
    left.set(title='Compute per token', xlabel='token of the reply', ylabel='active weights, % of dense')
    left.legend(frameon=False)
    left.grid(alpha=0.3)
    image = right.imshow(percent, cmap=colors, vmin=0, vmax=100, aspect='auto')
    for (row, column), value in np.ndenumerate(percent):
        if value == value:
            right.text(column, row, f'{value:.0f}', ha='center', va='center', color='white' if value > 50 else 'black')
    right.set(title='Weights used, %', xticks=range(len(MATRICES)), xticklabels=MATRICES, yticks=range(len(percent)),
              yticklabels=[f'layer {i}' for i in range(len(layers))] + ['head'])
    figure.colorbar(image, ax=right, label='% of dense')
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
