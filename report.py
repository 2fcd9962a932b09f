"""
What a reader sees of a training run when it ends: the picture, and the closing lines. Used by train.py.

    plot(rows, measured, 'out/training.png')            # rows: those of log.csv; measured: what train.evaluate returned
    for line in summary(measured, meta, config, seconds):
        print(line)

But: no live display, no comparison of runs.
"""

import math

import numpy as np

COLUMNS = ['step', 'seconds', 'loss', 'val_loss', 'reduction', 'target', 'lr']      # of log.csv


def plot(rows, measured, path):
    """training.png: the loss; the reduction against its target; and how much each layer's matrices are used."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    column = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), width_ratios=(1.2, 1, 1))
    left.plot(column['step'], column['loss'], color='0.75', lw=1, label='training')
    evaluated = [(step, loss) for step, loss in zip(column['step'], column['val_loss']) if loss is not None]
    left.plot([step for step, _ in evaluated], [loss for _, loss in evaluated], 'o-', color='#1f4e9c', ms=3, label='validation')
    left.set(title='Loss', xlabel='optimiser step', ylabel='nats per token')
    middle.plot(column['step'], column['target'], '--', color='0.4', label='target')
    middle.plot(column['step'], column['reduction'], color='#b8431f', label='reduction')
    middle.set(title='Compute reduction', xlabel='optimiser step', ylabel='dense / active weights per token')
    for axes in (left, middle):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    percent = 100 * np.array(measured['active'][:-1]).reshape(-1, 4)    # (layers, matrices)
    image = right.imshow(percent, cmap='cividis', vmin=0, vmax=max(percent.max(), 1), aspect='auto')
    for (layer, matrix), value in np.ndenumerate(percent):
        right.text(matrix, layer, f'{value:.0f}', ha='center', va='center', color='white' if value < 0.6 * percent.max() else 'black')
    right.set(title=f'Weights used on validation text, % (head: {100 * measured["active"][-1]:.0f})', xlabel='matrix', ylabel='layer',
              xticks=range(4), xticklabels=['qkv', 'out', 'up', 'down'], yticks=range(len(percent)))
    figure.colorbar(image, ax=right, label='% of dense')
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def clock(seconds):
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def summary(measured, meta, config, seconds):
    """The closing lines, a list. meta: the data set's meta.json; config: the TrainConfig; seconds: how long it took."""
    bits = measured['loss'] / math.log(2) * meta['val_tokens'] / meta['val_bytes'] if meta.get('val_bytes') else None
    percentiles = measured['compute_percentiles']
    lines = [f'done in {clock(seconds)}: validation loss {measured["loss"]:.4f} nats per token' + (f' ({bits:.3f} bits per byte)' if bits else '')
             + f', reduction {measured["reduction"]:.2f}x (target {config.target_reduction:g}x)']
    if config.target_reduction > 1:
        lines.append(f'compute per token: {100 / measured["reduction"]:.1f}% of dense on average, 5th to 95th percentile {100 * percentiles["5"]:.1f}% to '
                     f'{100 * percentiles["95"]:.1f}%; spread {100 * measured["spread"]:.1f}%; correlation with the entropy of the prediction {measured["entropy_correlation"]:+.2f}')
    return lines
