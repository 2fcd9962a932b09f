"""
Every picture but those of a chat, in one style: as wide as a README page, readable in grey. The suffix of the
path decides the format.

    python plots.py                     # draws the pictures in assets/ again, from the figures beside them
    python plots.py --run out/log.csv --twin out/dense/log.csv --picture twins.png      # two runs of your own

    plots.training(rows, best, matrices, 'out/training.png')        # train.py, at the end of a run
    plots.speed(rows, 'out/bench_decode.png', machine)              # lab/bench.py
    plots.frontier(rows, 'assets/frontier.png')                     # lab/baselines.py
    plots.tokens(kinds, positions, surprise, shares, matrices, 'assets/tokens.png')     # lab/compute.py

matplotlib takes a while to import, so that waits until a picture is drawn. Any failure in drawing or saving
becomes an OSError, with the reason in .strerror and the path in .filename.

Not here: windows on a screen, animation, pictures of a conversation (render.py draws them).
"""

import csv
import errno
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import read_text
from options import fail, option, parse_options

STYLE = {'font.size': 8, 'axes.titlesize': 9, 'axes.grid': True, 'grid.alpha': 0.3, 'axes.spines.top': False,
         'axes.spines.right': False, 'legend.frameon': False, 'lines.linewidth': 1.3, 'lines.markersize': 4}
# lines differ in marker and dashes too, so that they can be told apart in grey
COLORS = ('#1f4e9c', '#b8431f', '#2c8c4c', '#7a4fa0', '#a07800', '#555555', '#c0508a', '#2a93a8', '#8a8a8a',
          '#5f7d10', '#d08030', '#203040')
LINES = [dict(color=COLORS[i % 12], marker='os^Dv<>PX*'[i % 10], linestyle=('-', '--', '-.', ':')[i % 4])
         for i in range(36)]
QUIET = dict(color='0.6', linewidth=0.8)            # lines to compare with
LIGHT, DARK = (255, 234, 201), (100, 13, 100)       # the ends of the colour scale of compute
REDUCTION = 'reduction (dense / active weights)'
SUBJECTS = {'out/dense/best.safetensors': 'Small Python model', 'smollm2': 'SmolLM2-135M-Instruct'}
HERE = Path(__file__).resolve().parent


def scale_color(position):
    """position from 0 (light, little compute) to 1 (dark, much) -> (red, green, blue), 0 to 255."""
    return tuple(round(light + (dark - light) * min(max(position, 0), 1)) for light, dark in zip(LIGHT, DARK))


def text_color(rgb):
    """Black or white, whichever is easier to read on a colour of the scale."""
    return (0, 0, 0) if 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 119 else (255, 255, 255)


def check_picture(path):
    """Ends the program, before it has computed anything, if --picture names no format."""
    if Path(path).suffix not in ('.png', '.svg', '.pdf'):
        fail(f'--picture {path}: must end in .png, .svg or .pdf')


@contextmanager
def picture(path, width=9.0, height=3.2, columns=1, rows=1, **more):
    """Yields a figure and its axes, and saves it to path at the end. Sizes in inches, at 150 pixels each."""
    os.environ['MPLBACKEND'] = 'agg'        # a notebook's backend may be missing, and then the import fails
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
        with matplotlib.style.context(STYLE, after_reset=True):         # ignores a user's matplotlibrc
            figure = Figure(figsize=(width, height), layout='constrained')
            yield figure, figure.subplots(rows, columns, **more)
            figure.savefig(path, dpi=150)
    # matplotlib, its fonts and its formats fail in a dozen ways; callers have work to lose, and catch one
    except Exception as error:
        reason = getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'
        raise OSError(getattr(error, 'errno', None) or errno.EIO, reason, str(path)) from error


def heat_map(axes, shares, matrices, highest=1.0):
    """
    The percentage of each matrix's weights that was used, layer by layer, with the head in a row of its own.
    shares: a list, in the order of GPT.sparse_layers(); matrices: config.matrices; highest: the share at the
    dark end of the scale.
    """
    from matplotlib.colors import ListedColormap
    grid = np.full((len(shares) // len(matrices) + 1, len(matrices)), np.nan)
    grid.flat[:len(shares)] = 100 * np.array(shares)
    scale = ListedColormap(np.array([scale_color(i / 255) for i in range(256)]) / 255)
    image = axes.imshow(grid, cmap=scale, vmin=0, vmax=100 * highest, aspect='auto')
    layers = len(grid) - 1
    if layers <= 12:            # numbers would not fit the rows of more
        for (layer, matrix), percent in np.ndenumerate(grid):
            if not np.isnan(percent):
                color = np.array(text_color(scale_color(percent / 100 / highest))) / 255
                axes.text(matrix, layer, f'{percent:.0f}', ha='center', va='center', color=color)
    ticks = [*range(0, layers, 1 if layers <= 12 else 5), layers]
    axes.set(xticks=range(len(matrices)), xticklabels=matrices, yticks=ticks,
             yticklabels=[*ticks[:-1], 'head'], ylabel='layer')
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=axes, label='% of dense')


def draw_loss(axes, rows, name, line):
    """Draws a run's training loss in grey and its validation loss as a line. -> [(step, validation loss)]"""
    axes.plot([row[0] for row in rows], [row[2] for row in rows], **QUIET)
    evaluated = [(row[0], row[3]) for row in rows if row[3] is not None]
    axes.plot(*zip(*evaluated), label=name, **line)
    # the losses of the first steps, alike in every run, would flatten the rest
    axes.set(title='Loss (grey: of training batches)', xlabel='optimiser step', ylabel='nats per token',
             ylim=(None, 1.1 * max(value for _, value in evaluated)))
    return evaluated


def draw_reduction(axes, rows):
    step, reduction, target = (np.array([row[i] for row in rows]) for i in (0, 4, 5))
    axes.plot(step, reduction, color=COLORS[0], label='reduction')
    axes.plot(step, target, color='0.3', linestyle='--', label='target')
    axes.set(title='Reduction', xlabel='optimiser step', ylabel='dense / active weights per token')
    axes.legend()


def training(rows, best, matrices, path):
    """
    A run: its loss, its reduction beside the target, and the share of each matrix's weights that the best
    checkpoint uses. rows: of log.csv, with train.COLUMNS; best: the metadata of best.safetensors; matrices:
    config.matrices.
    """
    with picture(path, columns=3, width_ratios=(1.1, 1, 1)) as (_, (left, middle, right)):
        draw_loss(left, rows, 'validation', LINES[0])
        left.plot(best['step'], best['val_loss'], 'o', ms=8, mfc='none', mec='black',
                  label='best.safetensors')
        left.legend()
        draw_reduction(middle, rows)
        heat_map(right, best['active_share'], matrices, highest=max(best['active_share']))
        right.set(title='Weights used, % of each matrix')


def twins(rows, dense_rows, path):
    """A run and the same run without sparsity: both losses, and the reduction. rows: of log.csv."""
    with picture(path, columns=2, width_ratios=(1.4, 1)) as (_, (left, right)):
        ends = [draw_loss(left, *run)[-1] for run in ((dense_rows, 'dense, validation', LINES[1]),
                                                      (rows, 'CWIC, validation', LINES[0]))]
        for (step, value), place in zip(ends, ('top', 'bottom')):
            left.annotate(f'{value:.3f}', (step, value), xytext=(6, 0), textcoords='offset points', va=place)
        left.legend()
        draw_reduction(right, rows)


def speed(rows, path, machine=''):
    """
    Speed of decoding against reduction, in tokens per second and as a share of the memory's bandwidth. A line
    for each dtype and number of threads; other engines are level lines. rows: dicts as in the JSON of
    lab/bench.py; machine: a caption.
    """
    ours = [r for r in rows if r['engine'] == 'cwic']
    dtypes = list(dict.fromkeys(r['dtype'] for r in ours))
    most = max(r['threads'] for r in rows)
    keys = ('reduction', 'tok_s', 'tok_s_min', 'tok_s_max', 'roofline')
    others = [r for r in rows if r['engine'] != 'cwic' and r['threads'] == most]
    with picture(path, height=3.6, columns=2) as (figure, (left, right)):
        for dtype, threads in dict.fromkeys((r['dtype'], r['threads']) for r in ours):
            line = dict(LINES[dtypes.index(dtype)], linestyle='-' if threads == most else ':',
                        label=f'{dtype}, {threads} thread' + 's' * (threads > 1))
            same = [r for r in ours if (r['dtype'], r['threads']) == (dtype, threads)]
            reduction, tok_s, low, high, roofline = (np.array([r[key] for r in same]) for key in keys)
            left.errorbar(reduction, tok_s, (tok_s - low, high - tok_s), capsize=2, **line)
            right.plot(reduction, roofline, **line)
        place, space = -np.inf, 0.045 * max(r['tok_s_max'] for r in rows)
        for r in sorted(others, key=lambda r: r['tok_s']):
            left.axhline(r['tok_s'], zorder=0, **QUIET)
            place = max(place + space, r['tok_s'])          # names of close lines must not overlap
            left.text(1.01, place, f'{r["engine"]} {r["dtype"]}', fontsize=7, color='0.3', va='center',
                      transform=left.get_yaxis_transform())
        left.set(title='Decoding: median and spread', xlabel=REDUCTION, ylabel='tokens per second', ylim=0)
        left.legend()
        right.axhline(1, zorder=0, **QUIET)
        right.set(title='Share of the memory roofline', xlabel=REDUCTION, ylim=0,
                  ylabel='bytes read x speed / bandwidth')
        figure.supxlabel(machine, fontsize=6, color='0.4')


def frontier(rows, path):
    """
    KL against reduction for each method, as the median and the extremes of the seeds; one panel a subject.
    rows: dicts with subject, method, target, reduction and kl. Rows without a kl are left out, and so are the
    dense model and ablations ('CWIC: ...'). Returns whether there was anything to draw.
    """
    from matplotlib.ticker import LogLocator, NullFormatter
    rows = [r for r in rows if r.get('kl') is not None and r['method'] != 'dense' and ':' not in r['method']]
    if not rows:
        return False
    subjects = list(dict.fromkeys(r['subject'] for r in rows))
    methods = list(dict.fromkeys(r['method'] for r in rows))
    methods.sort(key=lambda method: method != 'CWIC')       # CWIC first
    lines = dict(zip(methods, LINES))
    with picture(path, height=4.2, columns=len(subjects), squeeze=False, sharex=True) as (figure, (panels,)):
        named = {}
        for axes, subject in zip(panels, subjects):
            for method, line in lines.items():
                ours = [r for r in rows if (r['subject'], r['method']) == (subject, method)]
                points = []
                for target in sorted({r['target'] for r in ours}):
                    seeds = [(r['reduction'], r['kl']) for r in ours if r['target'] == target]
                    reduction, values = zip(*seeds)
                    points.append((np.mean(reduction), np.median(values), min(values), max(values)))
                if points:
                    x, y, low, high = map(np.array, zip(*points))
                    bold = dict(linewidth=2.5, markersize=7, zorder=3) if method == 'CWIC' else {}
                    drawn = axes.errorbar(x, y, (y - low, high - y), capsize=2, label=method, **line | bold)
                    named[method] = drawn.lines[0]
            axes.set(title=SUBJECTS.get(subject, subject), xlabel=REDUCTION, yscale='log')
            axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter='{x:g}',
                           minor_formatter=NullFormatter())
        panels[0].set(ylabel='KL to the dense model, nats per token')
        figure.legend([named[method] for method in methods], methods, loc='outside right upper')
    return True


def tokens(kinds, positions, surprise, shares, matrices, path):
    """
    The share of weights used by kind of token, by position, by surprise, and by layer and matrix. kinds,
    positions and surprise come from by_kind(), by_position() and by_value() of lab/compute.py; shares and
    matrices are those of heat_map().
    """
    label = 'active weights, % of dense'
    with picture(path, height=6.4, columns=2, rows=2, width_ratios=(1.15, 1)) as (_, axes):
        (upper_left, upper_right), (lower_left, lower_right) = axes
        names, counts, means = zip(*[(kind, count, 100 * mean) for kind, count, mean, *_ in reversed(kinds)])
        upper_left.barh(names, means, color='#7d9ccc', ec='0.3', lw=0.5)
        for row, (count, mean) in enumerate(zip(counts, means)):
            upper_left.text(mean, row, f' {mean:.1f}% ({count:,})', va='center', fontsize=7)
        upper_left.set(title='By kind of token (how many)', xlabel=label, xlim=(0, 1.3 * max(means)))
        upper_left.grid(axis='y', visible=False)
        means = [100 * mean for *_, mean in positions]
        upper_right.plot(range(len(means)), means, **LINES[0])
        upper_right.set(title='By position in the text', ylabel=label, ylim=0, xticks=range(len(means)))
        ticks = [str(low) if low == high else f'{low}-{high}' for low, high, _ in positions]
        upper_right.set_xticklabels(ticks, rotation=45, ha='right')
        x, mean, low, high = np.array(surprise).T * [[1], [100], [100], [100]]
        lower_left.fill_between(x, low, high, color='0.88', label='10th to 90th percentile')
        lower_left.plot(x, mean, **LINES[1], label='mean of a tenth of all tokens')
        lower_left.set(title='By surprise of the token read', xlabel='-log p of the token, nats',
                       xscale='log', ylabel=label, ylim=(0, 1.3 * max(high)))
        lower_left.legend(loc='upper left')
        heat_map(lower_right, shares, matrices, highest=max(shares))
        lower_right.set(title='By layer and matrix, % of its weights')


# -----------------------------------------------------------------------------
# the pictures of README.md


@dataclass
class PlotConfig:
    about = 'Draws the pictures in assets/ again, or two runs of train.py: one sparse, one dense.'
    run: str = option('', 'log.csv of a run; without it, the pictures in assets/ are drawn')
    twin: str = option('', 'log.csv of the same run with --target_reduction 1')
    picture: str = option('out/twins.png', 'file for the picture of the two runs')


def read_log(path):
    """log.csv -> rows of numbers, None for an empty cell. Raises OSError, ValueError and IndexError."""
    rows = [[float(text) if text else None for text in row]
            for row in list(csv.reader(read_text(path).splitlines()))[1:]]
    if all(row[3] is None for row in rows):
        raise ValueError('it has no validation loss yet')
    return rows


def draw_assets():
    """Returns the paths of the pictures."""
    assets = HERE / 'assets'
    pictures = {name: str(assets / f'{name}.png') for name in ('frontier', 'speed', 'training')}
    rows = read_text(assets / 'comparison.jsonl').splitlines()
    frontier([json.loads(row) for row in rows], pictures['frontier'])
    decoding = json.loads(read_text(assets / 'decode.json'))
    speed(decoding['rows'], pictures['speed'], decoding['machine'])
    twins(read_log(assets / 'training.csv'), read_log(assets / 'training_dense.csv'), pictures['training'])
    return pictures.values()


def main():
    config, _ = parse_options(PlotConfig, 'python plots.py')
    if bool(config.run) != bool(config.twin):
        fail('--run and --twin go together: the log.csv of a sparse run, and of a dense one')
    try:
        if config.run:
            twins(read_log(config.run), read_log(config.twin), config.picture)
        print('files:', ', '.join([config.picture] if config.run else draw_assets()))
    except OSError as error:
        fail(f'{error.filename}: {error.strerror}', 1)
    except (ValueError, IndexError) as error:
        fail(f'no log.csv of a run: {error}', 1)


if __name__ == '__main__':
    main()
