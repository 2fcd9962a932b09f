"""
baselines.py: a comparison's rows and tables, also when it was stopped; and variants of CWIC.

Models are random and tiny: tested is what is computed and written, not how good the methods are.
"""

import json
import signal
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from lab import baselines
import cwic
import evaluate
from lab import methods
import train
import weights
from lab.baselines import ALL_METHODS
from checkpoint import save_checkpoint
from data import common
from test_cwic import one_thread, small_model           # noqa: F401  one_thread: a fixture, for all
from test_methods import SIZES, changed


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
    """
    A folder with a dense checkpoint, a recipe, and data: training text is bytes below 128, validation text the
    others.
    """
    folder = tmp_path_factory.mktemp('comparison')
    random = np.random.default_rng(0)
    meta = {'tokenizer': {'kind': 'bytes'}, 'vocab_size': 257, 'source': 'a test'}
    for split, least in (('train', 0), ('val', 128)):
        random.integers(least, least + 128, 3000).astype(np.uint16).tofile(folder / f'{split}.bin')
        meta.update({f'{split}_tokens': 3000, f'{split}_bytes': 3000})
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    options = train.TrainConfig(**{**SIZES_OF_RUN, 'dense_steps': 3, 'ramp_steps': 1, 'hold_steps': 1})
    save_checkpoint(folder / 'dense.safetensors', small_model(thresholds=0.0, **SIZES), tokenizer={'kind': 'bytes'},
                    options=asdict(options), val_loss=5.0)
    (folder / 'recipe.toml').write_text(
        f'data = {str(folder)!r}\nramp_steps = 3\nhold_steps = 9\nblock_size = 16\nbatch_size = 4\n'
        'lr = 1e-3\ndtype = "float32"\n', encoding='utf-8')
    return folder


QUICK = ['--targets', '2', '--trained_targets', '2', '--seeds', '1', '--steps', '2']
SIZES_OF_RUN = {**{name: value for name, value in SIZES.items() if name != 'vocab_size'},
                'batch_size': 4, 'device': 'cpu', 'dtype': 'float32'}


def compare(setting, out, *more):
    """Runs the program in this process; returns its rows."""
    argv, handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = ['lab/baselines.py', '--subject', str(setting / 'dense.safetensors'), '--out', str(out),
                '--recipe', str(setting / 'recipe.toml'), '--picture', str(out) + '.png', '--device', 'cpu',
                '--windows', '4', *more]
    try:
        common.run(baselines.main)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)
    with open(out / 'rows.jsonl', encoding='utf-8') as f:
        return list(map(json.loads, f))


def test_own_targets_charge_each_matrix_the_slope_of_its_own_loss(monkeypatch):
    _, model, _ = changed('CWIC: own targets')
    total, target, paid = model.n_weights(), 3.0, {}
    run = train.Run(None, model, {}, None, 'cpu', torch.float32,
                    torch.tensor([layer.n_weights * (0.3 + 0.05 * i) for i, (_, layer) in enumerate(model.sparse_layers())]))
    monkeypatch.setattr(train, 'train_step', lambda run, tokens, targets, target:
                        paid.update(price=cwic.price(run.active.sum(), total, target)))
    ALL_METHODS['CWIC: own targets'].step(run, None, None, target)
    for active, (_, layer) in zip(run.active.tolist(), model.sparse_layers()):
        def loss(active):
            return layer.n_weights / total * max(target - layer.n_weights / active, 0) ** 2
        slope = (loss(active + 0.01) - loss(active - 0.01)) / 0.02
        assert layer.push * paid['price'] == pytest.approx(slope, rel=1e-3, abs=1e-9)
        x = torch.randn(1, 3, layer.n_in, requires_grad=True)
        layer.sigma.fill_(1.0), layer.theta.fill_(0.5 / layer.scale).requires_grad_(True)
        layer(x)[1][0].sum().backward()
        own, layer.theta.grad, push = layer.theta.grad, None, layer.push
        layer.push = 1.0
        layer(x)[1][0].sum().backward()
        assert torch.allclose(own, push * layer.theta.grad, atol=1e-3)


def test_a_short_comparison_of_all_methods(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, 'RANK', 2)
    rows = compare(setting, tmp_path / 'out', *QUICK)
    assert [r['method'] for r in rows if 'cannot' in r] == ['CATS', 'ShadowLLM']
    rows = {r['method']: r for r in rows if 'cannot' not in r}
    assert rows.keys() == ALL_METHODS.keys() - {'CATS', 'ShadowLLM'}
    for name, r in rows.items():
        assert r.keys() >= {'subject', 'method', 'target', 'reduction', 'val_loss', 'kl', 'agreement', 'blimp',
                            'cv', 'seed', 'trained_tokens'}
        steps = 5 + 2 if name == 'smaller dense' else 2         # it trains like the dense model, too
        assert r['trained_tokens'] == (steps * 4 * 16 if ALL_METHODS[name].trained else 0)
        assert np.isfinite([r['reduction'], r['val_loss'], r['kl'], r['cv']]).all()
    assert rows['dense']['kl'] == pytest.approx(0, abs=1e-6) and rows['dense']['reduction'] == 1
    assert rows['TEAL']['kl'] > 1e-3 and rows['Q-Sparse']['cv'] == rows['pruning']['cv'] == 0
    assert rows['TEAL + distillation']['val_loss'] != rows['TEAL']['val_loss']
    out = capsys.readouterr().out
    table = (tmp_path / 'out' / 'table.md').read_text(encoding='utf-8')
    assert table in out and '24/24' in out
    assert f'| Q-Sparse | 2x | {rows["Q-Sparse"]["reduction"]:.2f} | {rows["Q-Sparse"]["kl"]:.4f} |' in table
    assert '| CATS | 2x | cannot: at most' in table
    assert (tmp_path / 'out.png').read_bytes().startswith(b'\x89PNG')


def test_a_smaller_model_is_counted_against_the_dense_one(setting, tmp_path, monkeypatch):
    """It uses all of its own weights, so its own reduction is 1."""
    models, measure = [], evaluate.measure
    monkeypatch.setattr(evaluate, 'measure', lambda model, *args: models.append(model) or measure(model, *args))
    row, = compare(setting, tmp_path / 'out', '--methods', 'smaller dense', '--trained_targets', '2', '--seeds', '1')
    small, dense = (sum(layer.n_weights for _, layer in model.sparse_layers())
                    for model in (models[-1], weights.load(str(setting / 'dense.safetensors'))[0]))
    assert row['reduction'] == pytest.approx(dense / small) and row['reduction'] >= 2
    assert row['trained_tokens'] == (5 + 12) * 4 * 16       # the dense model's steps, and the recipe's


def test_thresholds_are_set_on_other_text_than_results_are_for(setting, tmp_path, monkeypatch):
    """Thresholds calibrated on the text they are evaluated on look better than they are."""
    seen = {'calibrate': set(), 'measure': set()}
    calibrate, measure = methods.calibrate, evaluate.measure

    def spied_calibrate(module, inputs, *more, **rule):
        if isinstance(module, cwic.GPT):
            seen['calibrate'].update(inputs[0].unique().tolist())
        return calibrate(module, inputs, *more, **rule)

    def spied_measure(model, tokens, *more):
        seen['measure'].update(np.unique(tokens).tolist())
        return measure(model, tokens, *more)
    monkeypatch.setattr(methods, 'calibrate', spied_calibrate)
    monkeypatch.setattr(evaluate, 'measure', spied_measure)
    monkeypatch.setattr(methods, 'RANK', 2)
    for spied in ('limit', 'step'):
        method = getattr(methods.DejaVu, spied)
        monkeypatch.setattr(methods.DejaVu, spied, lambda self, what, *more, method=method: seen['calibrate'].update(
            torch.cat([x.flatten() for x in more if isinstance(x, torch.Tensor)]).tolist()) or method(self, what, *more))
    compare(setting, tmp_path / 'out', *QUICK, '--methods', 'TEAL,SCAP,TEAL + distillation,pruning,Deja Vu')
    assert seen['calibrate'] and max(seen['calibrate']) < 128 <= min(seen['measure'])


def test_a_llama_is_compared_with_lora(setting, tmp_path):
    """As the chat model is: matrices frozen, a low-rank change of each learned."""
    dense = small_model('llama', thresholds=0.0, **SIZES)
    save_checkpoint(tmp_path / 'llama.safetensors', dense, tokenizer={'kind': 'bytes'})
    recipe = (setting / 'recipe.toml').read_text(encoding='utf-8') + 'lora_rank = 2\n'
    (tmp_path / 'rank.toml').write_text(recipe, encoding='utf-8')
    rows = compare(setting, tmp_path / 'out', *QUICK, '--subject', str(tmp_path / 'llama.safetensors'),
                   '--recipe', str(tmp_path / 'rank.toml'), '--targets', '1.3')
    reasons = {r['method']: r['cannot'] for r in rows if 'cannot' in r}
    assert reasons.keys() == {name for name, method in ALL_METHODS.items() if method.gpt2_only} | {'smaller dense'}
    done = {r['method']: r for r in rows if 'cannot' not in r}
    assert done.keys() == ALL_METHODS.keys() - reasons.keys() and done['dense']['kl'] == pytest.approx(0, abs=1e-6)
    for name in ('TEAL', 'CATS', 'WINA', 'R-Sparse'):
        assert done[name]['reduction'] == pytest.approx(1.3, rel=0.1) and done[name]['kl'] > 1e-4


@pytest.mark.parametrize('name', ['TEAL + distillation', 'pruning'])
def test_training_moves_weights_and_leaves_thresholds_to_the_method(name, setting, tmp_path, monkeypatch):
    """A step of train.py would lift thresholds to their floor."""
    followed, steps, train_step, follow = {}, [], train.train_step, type(ALL_METHODS[name]).follow

    def spied_follow(self, model, *more):
        follow(self, model, *more)
        followed.update({name: x.clone() for name, x in model.state_dict().items() if 'theta' in name or '.mu' in name})

    def spied_step(run, *more, **options):
        state = run.model.state_dict()
        assert all(torch.equal(state[name], x) for name, x in followed.items())
        before = run.model.head.weight.clone()
        train_step(run, *more, **options)
        steps.append(float((run.model.head.weight - before).detach().abs().max()))
    monkeypatch.setattr(type(ALL_METHODS[name]), 'follow', spied_follow)
    monkeypatch.setattr(train, 'train_step', spied_step)
    compare(setting, tmp_path / 'out', '--methods', name, '--trained_targets', '2', '--seeds', '1')
    assert len(steps) == 12 and min(steps) > 0 and len(followed) == 2 * 9


@pytest.mark.parametrize('name', ['Q-Sparse', 'ProSparse', 'Deja Vu', 'CWIC'])
def test_nothing_is_compiled_again_in_the_middle_of_training(name, setting, tmp_path, monkeypatch):
    """
    A layer once kept a number that changes from step to step. torch compiled all blocks again at each change,
    until it reached its limit and ran them uncompiled, ten times slower.
    """
    compiled, before_step, really_compile, step = [], [], torch.compile, type(ALL_METHODS[name]).step

    def spied_step(self, *args):
        before_step.append(len(compiled))
        step(self, *args)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: really_compile(
        function, backend=lambda graph, inputs: compiled.append(graph) or graph.forward))
    monkeypatch.setattr(train, 'check_compile', lambda device: None)
    monkeypatch.setattr(type(ALL_METHODS[name]), 'step', spied_step)
    monkeypatch.setattr(methods, 'RANK', 2)
    monkeypatch.setattr(baselines, 'EVERY', 2)
    recipe = (setting / 'recipe.toml').read_text(encoding='utf-8')
    (tmp_path / 'compile.toml').write_text(recipe + 'compile = true\n', encoding='utf-8')
    compare(setting, tmp_path / 'out', *QUICK, '--methods', name, '--steps', '8',
            '--recipe', str(tmp_path / 'compile.toml'))
    torch.compiler.reset()
    if name == 'Deja Vu':       # it has hooks in its blocks
        assert not compiled
    else:
        assert len(before_step) == 8 and 0 == before_step[0] < before_step[2] == len(compiled)


def test_a_stopped_comparison_continues_to_the_same_rows(setting, tmp_path, monkeypatch, capsys):
    more = ['--methods', 'dense,TEAL,CWIC,TEAL + distillation', '--targets', '1.5,2', '--trained_targets', '2',
            '--seeds', '1,2', '--steps', '4']
    whole = compare(setting, tmp_path / 'whole', *more)
    run_method, done = baselines.run_method, []

    def interrupted(job, *args):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job)
        return run_method(job, *args)
    monkeypatch.setattr(baselines, 'run_method', interrupted)
    with pytest.raises(SystemExit) as ended:
        compare(setting, tmp_path / 'parts', *more)
    assert ended.value.code == 130 and 'interrupted' in capsys.readouterr().err
    monkeypatch.setattr(baselines, 'run_method', run_method)
    assert compare(setting, tmp_path / 'parts', *more) == whole and '3 runs to do' in capsys.readouterr().out
    assert len(whole) == 7 and whole[3]['kl'] != whole[4]['kl']         # two seeds
    assert compare(setting, tmp_path / 'parts', *more) == whole


@pytest.mark.parametrize('more', ['bases', 'shortlist'])
def test_a_recipes_bases_and_shortlist_are_kept_from_other_methods(setting, tmp_path, more):
    """A recipe with bases once made every rival's head pay for a rotation that it did not use."""
    recipe = tmp_path / 'recipe.toml'
    recipe.write_text((setting / 'recipe.toml').read_text(encoding='utf-8') + f'{more} = true\n', encoding='utf-8')
    one_each = ['--targets', '2', '--trained_targets', '2', '--seeds', '1']
    without = compare(setting, tmp_path / 'a', *one_each, '--methods', 'TEAL,CWIC')
    some = compare(setting, tmp_path / 'b', *one_each, '--methods', f'TEAL,CWIC,CWIC: {more}', '--recipe', str(recipe))
    kl, kl_of_some = ({row['method']: row['kl'] for row in rows} for rows in (without, some))
    assert len(set(kl_of_some.values())) == 3
    assert kl == {name: kl_of_some[name] for name in kl}


def test_ablations_alone_have_a_table_and_no_picture(setting, tmp_path, capsys):
    """A picture without any method ended in a traceback, after an hour of training."""
    compare(setting, tmp_path / 'out', *QUICK, '--methods', 'CWIC: no centre')
    assert '| CWIC: no centre |' in capsys.readouterr().out and not (tmp_path / 'out.png').exists()


def test_what_a_user_gets_wrong_is_one_line(setting, tmp_path, monkeypatch, capsys):
    compare(setting, tmp_path / 'out', '--methods', 'TEAL', '--targets', '2')
    sparse = small_model(thresholds=1.0, **SIZES)
    save_checkpoint(tmp_path / 'sparse.safetensors', sparse, tokenizer={'kind': 'bytes'})
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'rows.jsonl').write_text('hello\n', encoding='utf-8')
    capsys.readouterr()
    for out, more, says in (('out', ['--methods', 'TEEL'], 'there are dense, TEAL'),
                            ('out', ['--targets', '2,x'], 'must be such as 2,3'),
                            ('out', ['--targets', '0.5'], 'must be such as 2,3'),
                            ('out', ['--windows', '5'], 'with other options'),
                            ('foreign', [], 'not written by this program'),
                            ('out', ['--subject', str(tmp_path / 'sparse.safetensors')], 'is sparse already'),
                            ('out', ['--subject', str(tmp_path / 'none.safetensors')], 'no such model'),
                            ('out', ['--picture', 'frontier.foo'], 'must end in .png, .svg or .pdf'),
                            ('out', ['--blimp', str(tmp_path / 'none.jsonl')], 'none.jsonl: cannot be read'),
                            ('out', ['--recipe', str(tmp_path / 'none.toml')], 'none.toml')):
        with pytest.raises(SystemExit) as ended:
            compare(setting, tmp_path / out, *more)
        error = capsys.readouterr().err
        assert ended.value.code in (1, 2) and error.count('\n') == 1 and says in error, error
    monkeypatch.chdir(tmp_path)                     # the default --subject is not there
    monkeypatch.setattr(sys, 'argv', ['lab/baselines.py', '--recipe', str(setting / 'recipe.toml')])
    with pytest.raises(SystemExit):
        baselines.main()
    assert 'train.py --target_reduction 1 --out out/dense' in capsys.readouterr().err
