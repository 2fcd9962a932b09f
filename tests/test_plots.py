"""plots.py: the contents of the pictures, read back from the figures as they are saved."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

import plots
import train


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved so far."""
    figures, save = [], Figure.savefig

    def savefig(self, *args, **more):
        figures.append(self)
        save(self, *args, **more)
    monkeypatch.setattr(Figure, 'savefig', savefig)
    return figures


def points(axes, label):
    """The points of the line with this label: (points, 2)"""
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    line = handles[label][0] if isinstance(handles[label], tuple) else handles[label]
    return np.stack(line.get_data(), axis=1)


@pytest.mark.parametrize('layers', [2, 30])
def test_training_shows_the_run_and_the_shares_of_best(layers, drawn, tmp_path):
    """The picture once showed the last evaluation, not the best one."""
    val_loss = {100: 4.5, 200: 4.8}
    rows = [[step, step / 2, 5 - step / 100, val_loss.get(step), 1 + step / 150, 3.0, 1e-3]
            for step in range(10, 201, 10)]
    shares = list(np.linspace(0.1, 0.6, 4 * layers + 1))
    best = {'step': 100, 'val_loss': 4.5, 'active_share': shares}
    plots.training(rows, best, ('qkv', 'out', 'gate', 'neurons'), tmp_path / 'training.png')
    left, middle, right = drawn[0].axes[:3]
    assert points(left, 'validation').tolist() == [[100, 4.5], [200, 4.8]]
    assert points(left, 'best.safetensors').tolist() == [[100, 4.5]]
    assert left.get_ylim()[1] > 4.8         # a loss that rises, as a pretrained model's does, stays in sight
    assert np.allclose(points(middle, 'reduction')[:, 1], [row[4] for row in rows])
    grid = right.images[0].get_array()          # (layers + 1, 4), in %
    assert np.allclose(grid.compressed(), 100 * np.array(shares)) and grid.shape == (layers + 1, 4)
    numbers = [f'{100 * share:.0f}' for share in shares] if layers == 2 else []
    assert [text.get_text() for text in right.texts] == numbers
    assert [label.get_text() for label in right.get_xticklabels()] == ['qkv', 'out', 'gate', 'neurons']
    width, _ = drawn[0].get_size_inches()
    assert width == 9 and (tmp_path / 'training.png').read_bytes().startswith(b'\x89PNG')


def test_frontier_draws_the_median_and_the_extremes_of_seeds(drawn, tmp_path):
    kl = {2: [0.1, 0.3, 0.15], 3: [0.5]}
    rows = [dict(subject='small', method='CWIC', target=target, reduction=target + 0.1 * seed, kl=value)
            for target, values in kl.items() for seed, value in enumerate(values)]
    rows += [dict(subject='small', method=method, target=3, reduction=3.0, kl=0.2)      # these are in the table
             for method in ('dense', 'CWIC: no centre')]
    rows += [dict(subject='chat', method='TEAL', target=2, reduction=2.0, kl=0.7),
             dict(subject='chat', method='CATS', target=3, reduction=None, kl=None)]        # out of its reach
    assert plots.frontier(rows, tmp_path / 'frontier.svg')
    small, chat = drawn[0].axes
    assert np.allclose(points(small, 'CWIC'), [[2.1, 0.15], [3, 0.5]]) and small.get_title() == 'small'
    bars = small.containers[0].lines[2][0].get_segments()
    assert np.allclose([bar[:, 1] for bar in bars], [[0.1, 0.3], [0.5, 0.5]])
    assert points(chat, 'TEAL').tolist() == [[2, 0.7]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ['CWIC', 'TEAL']
    assert not plots.frontier(rows[4:6], tmp_path / 'none.svg') and not (tmp_path / 'none.svg').exists()


def test_speed_draws_every_dtype_and_thread_count(drawn, tmp_path):
    rows = [dict(what='decode', engine='cwic', dtype=dtype, threads=threads, reduction=reduction,
                 tok_s=100 * reduction, tok_s_min=90 * reduction, tok_s_max=120 * reduction,
                 roofline=0.9 / reduction)
            for dtype in ('f32', 'int8') for threads in (1, 2) for reduction in (1, 3, 6)]
    rows += [dict(rows[0], engine='llama.cpp', dtype=dtype, threads=2, tok_s=speed)
             for dtype, speed in (('Q8_0', 139), ('Q4_0', 140), ('f32', 50))]
    plots.speed(rows, tmp_path / 'speed.png', 'a machine')
    left, right = drawn[0].axes
    for label in ('f32, 1 thread', 'f32, 2 threads', 'int8, 1 thread', 'int8, 2 threads'):
        assert points(left, label).tolist() == [[1, 100], [3, 300], [6, 600]]
        assert np.allclose(points(right, label)[:, 1], [0.9, 0.3, 0.15])
    names = [(text.get_text(), text.get_position()[1]) for text in left.texts]
    assert [name for name, _ in names] == ['llama.cpp f32', 'llama.cpp Q8_0', 'llama.cpp Q4_0']
    assert np.diff([place for _, place in names]).min() > 20          # of 720: they do not overlap


def write_log(path, val_losses):
    """A log.csv as train.py writes it, of 40 steps."""
    rows = [[step, step / 2, 5 - step / 100, val_losses.get(step, ''), 1 + step / 20, 3.0, 1e-3]
            for step in range(10, 41, 10)]
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([train.COLUMNS, *rows])
    return str(path)


def run_program(monkeypatch, *words):
    monkeypatch.setattr(sys, 'argv', ['plots.py', *words])
    plots.main()


def test_two_runs_from_their_logs(drawn, tmp_path, monkeypatch, capsys):
    sparse = write_log(tmp_path / 'log.csv', {20: 4.5, 40: 4.3})
    dense = write_log(tmp_path / 'dense.csv', {20: 4.5, 40: 4.1})
    run_program(monkeypatch, '--run', sparse, '--twin', dense, '--picture', str(tmp_path / 'twins.svg'))
    left, right = drawn[0].axes
    assert points(left, 'CWIC, validation').tolist() == [[20, 4.5], [40, 4.3]]
    assert points(left, 'dense, validation').tolist() == [[20, 4.5], [40, 4.1]]
    assert [text.get_text() for text in left.texts] == ['4.100', '4.300']
    assert points(right, 'reduction').tolist() == [[10, 1.5], [20, 2], [30, 2.5], [40, 3]]
    assert 'twins.svg' in capsys.readouterr().out and (tmp_path / 'twins.svg').exists()


@pytest.mark.parametrize('run, twin, code, word', [
    ('log.csv', 'nowhere.csv', 1, 'No such file'), ('log.csv', '', 2, 'go together'),
    ('empty.csv', 'log.csv', 1, 'no log.csv'), ('prose.csv', 'log.csv', 1, 'no log.csv'),
    ('start.csv', 'log.csv', 1, 'no log.csv')])
def test_logs_that_cannot_be_drawn_are_one_line(run, twin, code, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_log('log.csv', {40: 4.1})
    write_log('start.csv', {})                      # of a run that was stopped before its first evaluation
    (tmp_path / 'empty.csv').touch()
    (tmp_path / 'prose.csv').write_text('a, b\nnot, numbers\n', encoding='utf-8')
    with pytest.raises(SystemExit) as ended:
        run_program(monkeypatch, '--run', run, '--twin', twin, '--picture', 'twins.png')
    error = capsys.readouterr().err
    assert ended.value.code == code and error.count('\n') == 1 and word in error


def test_pictures_in_assets_are_drawn_from_the_committed_figures(drawn, tmp_path, monkeypatch, capsys):
    """One point of the comparison is checked against its row."""
    shutil.copytree(plots.HERE / 'assets', tmp_path / 'assets')
    pictures = sorted(path.name for path in (tmp_path / 'assets').glob('*.png'))
    monkeypatch.setattr(plots, 'HERE', tmp_path)
    run_program(monkeypatch)
    assert {path.rsplit('/', 1)[1].strip() for path in capsys.readouterr().out.split(',')} < set(pictures)
    with open(tmp_path / 'assets' / 'comparison.jsonl', encoding='utf-8') as f:
        row, = (row for row in map(json.loads, f) if (row['subject'], row['method'], row['target'])
                == ('smollm2', 'CWIC', 6))
    small, chat = drawn[0].axes
    assert np.allclose(points(chat, 'CWIC')[-1], (row['reduction'], row['kl']))


def test_tokens_draws_all_four_panels(drawn, tmp_path):
    kinds = [('name', 2000, 0.4, 2.0, 0.1), ('digits', 30, 0.25, 1.0, 0.2), ('first token', 4, 0.1, np.nan, 0.3)]
    positions = [(0, 0, 0.1), (1, 1, 0.2), (2, 3, 0.3), (4, 6, 0.35)]
    surprise = [(0.01, 0.2, 0.1, 0.3), (0.5, 0.25, 0.2, 0.35), (4.0, 0.3, 0.25, 0.4)]
    shares = list(np.linspace(0.1, 0.6, 2 * 6 + 1))
    matrices = ('q', 'k', 'v', 'out', 'gate', 'neurons')
    plots.tokens(kinds, positions, surprise, shares, matrices, tmp_path / 'tokens.png')
    by_kind, by_position, by_surprise, by_matrix = drawn[0].axes[:4]
    bars = {label.get_text(): bar.get_width() for label, bar in zip(by_kind.get_yticklabels(), by_kind.patches)}
    assert bars == pytest.approx({'first token': 10, 'digits': 25, 'name': 40})
    assert [text.get_text() for text in by_kind.texts] == [' 10.0% (4)', ' 25.0% (30)', ' 40.0% (2,000)']
    line, = by_position.lines
    assert np.allclose(line.get_data(), [range(4), [10, 20, 30, 35]])
    assert [label.get_text() for label in by_position.get_xticklabels()] == ['0', '1', '2-3', '4-6']
    assert np.allclose(points(by_surprise, 'mean of a tenth of all tokens'), [[0.01, 20], [0.5, 25], [4, 30]])
    band = by_surprise.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in np.round(band, 6)} == {(0.01, 10), (0.01, 30), (0.5, 20), (0.5, 35), (4, 25), (4, 40)}
    assert np.allclose(by_matrix.images[0].get_array().compressed(), 100 * np.array(shares))
    assert [label.get_text() for label in by_matrix.get_xticklabels()] == list(matrices)


def test_settings_of_a_notebook_or_a_user_change_nothing(tmp_path):
    """
    A notebook's backend, if missing, ended train.py in a traceback, as did text.usetex without LaTeX; other settings in
    a user's matplotlibrc changed the looks of our pictures.
    """
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nlines.color: nonsense\naxes.facecolor: red\n', encoding='utf-8')
    draw = 'import plots; rows = [[1, 1, 5, 4.5, 1, 1, 1]]; plots.twins(rows, rows, "twins.png")'
    pictures = []
    for settings in ({}, {'MPLBACKEND': 'module://matplotlib_inline.backend_inline', 'MATPLOTLIBRC': str(tmp_path)}):
        subprocess.run([sys.executable, '-c', draw], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL,
                       env={**os.environ, 'PYTHONPATH': str(plots.HERE), **settings})
        pictures.append((tmp_path / 'twins.png').read_bytes())
    assert pictures[0] == pictures[1]


def test_every_failure_in_drawing_is_an_os_error(tmp_path, monkeypatch):
    """A missing font, an unknown format, a missing folder: callers can then report each in one line."""
    def fail(*args):
        raise RuntimeError('no font\nat all')

    rows = [[1, 1, 5, 4.5, 1, 1, 1]]
    for path, word in ((tmp_path / 'a.xyz', 'xyz'), (tmp_path / 'no' / 'a.png', 'No such file')):
        with pytest.raises(OSError, match=word) as caught:
            plots.twins(rows, rows, path)
        assert caught.value.filename == str(path) and word in caught.value.strerror
    monkeypatch.setattr(plots, 'draw_reduction', fail)
    with pytest.raises(OSError, match='RuntimeError: no font'):
        plots.twins(rows, rows, tmp_path / 'a.png')


def test_training_does_not_import_the_chats_renderer():
    code = 'import sys, train; print("render" in sys.modules, "plots" in sys.modules)'
    run = subprocess.run([sys.executable, '-c', code], cwd=plots.HERE, capture_output=True, text=True)
    assert run.stdout == 'False True\n'
