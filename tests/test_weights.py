"""gpt2.py: tiny random weights in the layout of GPT-2's release, against a forward pass written here in numpy; and all that can be wrong with a file."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch

import cwic
import weights
import train
from weights import WeightsError
from test_tokenizer import GPT2_MERGES, write_gpt2_dir
from test_train import one_line, run

VOCAB, CONTEXT, LAYERS, HEADS, D = 256 + len(GPT2_MERGES) + 1, 16, 2, 2, 12
CONFIG = {'model_type': 'gpt2', 'vocab_size': VOCAB, 'n_positions': CONTEXT, 'n_ctx': CONTEXT, 'n_layer': LAYERS, 'n_head': HEADS, 'n_embd': D,
          'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-05, 'architectures': ['GPT2LMHeadModel']}


def random_release(seed=0):
    """The tensors of a tiny GPT-2 under the release's names, written out by hand; no two of them are alike."""
    shapes = {'wte.weight': (VOCAB, D), 'wpe.weight': (CONTEXT, D)}
    for i in (0, 1):
        shapes |= {f'h.{i}.ln_1.weight': (D,), f'h.{i}.ln_1.bias': (D,), f'h.{i}.attn.c_attn.weight': (D, 3 * D), f'h.{i}.attn.c_attn.bias': (3 * D,),
                   f'h.{i}.attn.c_proj.weight': (D, D), f'h.{i}.attn.c_proj.bias': (D,), f'h.{i}.ln_2.weight': (D,), f'h.{i}.ln_2.bias': (D,),
                   f'h.{i}.mlp.c_fc.weight': (D, 4 * D),
                   f'h.{i}.mlp.c_fc.bias': (4 * D,), f'h.{i}.mlp.c_proj.weight': (4 * D, D), f'h.{i}.mlp.c_proj.bias': (D,)}
    shapes |= {'ln_f.weight': (D,), 'ln_f.bias': (D,)}
    random = np.random.default_rng(seed)
    centre = {name: float(name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight'))) for name in shapes}
    return {name: random.normal(centre[name], 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def forward(w, tokens):
    """GPT-2 in numpy, float64, from the release's names: tokens (T) -> logits (T, vocab)."""
    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name + '.weight'] + w[name + '.bias']

    def linear(x, name):
        return x @ w[name + '.weight'] + w[name + '.bias']

    w = {name: x.astype(np.float64) for name, x in w.items()}
    T, size = len(tokens), D // HEADS
    x = w['wte.weight'][tokens] + w['wpe.weight'][:T]
    for i in range(LAYERS):
        q, k, v = np.split(linear(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn'), 3, axis=1)
        heads = []
        for h in range(HEADS):
            one = slice(h * size, (h + 1) * size)
            scores = np.where(np.tri(T, dtype=bool), q[:, one] @ k[:, one].T / np.sqrt(size), -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, one])
        x = x + linear(np.concatenate(heads, axis=1), f'h.{i}.attn.c_proj')
        a = linear(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc')
        x = x + linear(0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a ** 3))), f'h.{i}.mlp.c_proj')
    return norm(x, 'ln_f') @ w['wte.weight'].T


def write_safetensors(path, tensors, blanks=0):
    """The format as it is defined, without our reader. blanks: in the header, to shift what follows by as many bytes."""
    kinds = {'float32': 'F32', 'float16': 'F16', 'int32': 'I32', 'bool': 'BOOL'}
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, x in tensors.items():
        header[name] = {'dtype': kinds[str(x.dtype)], 'shape': list(x.shape), 'data_offsets': [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(header).encode() + b' ' * blanks
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def write_bin(path, tensors, **more):
    torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, path, **more)


def write_release(folder, tensors=None, config=CONFIG):
    """A whole folder, tokenizer included."""
    write_gpt2_dir(folder, GPT2_MERGES)
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    write_safetensors(folder / 'model.safetensors', random_release() if tensors is None else tensors)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_release(tmp_path / 'release')


def refused(folder):
    """Why this folder is not taken: one line."""
    with pytest.raises(WeightsError) as error:
        weights.load(str(folder))
    assert '\n' not in str(error.value)
    return str(error.value)


# -----------------------------------------------------------------------------
# the weights arrive where they belong


def saved_with_a_head(tensors):
    """As the release's own class saves it: a prefix, the tied head again, and the causal masks."""
    masks = {f'transformer.h.{i}.attn.bias': np.tri(CONTEXT, dtype=np.float32)[None, None] for i in range(LAYERS)}
    masks |= {f'transformer.h.{i}.attn.masked_bias': np.full((), -1e4, np.float32) for i in range(LAYERS)}
    return {'transformer.' + name: x for name, x in tensors.items()} | masks | {'lm_head.weight': tensors['wte.weight']}


@pytest.mark.parametrize('kind', ['safetensors', 'safetensors at odd bytes', 'safetensors with a head', 'bin', 'bin with a head', 'bin of 2019'])
def test_forward_equals_numpy(folder, kind):
    """Every tensor is random, so one put in another's place, or turned over (the square one too), would show."""
    tensors = random_release()
    written = saved_with_a_head(tensors) if 'head' in kind else tensors
    if 'bin' in kind:
        (folder / 'model.safetensors').unlink()
        write_bin(folder / 'pytorch_model.bin', written, _use_new_zipfile_serialization='2019' not in kind)
    else:
        write_safetensors(folder / 'model.safetensors', written, blanks=3 if 'odd' in kind else 0)
    model, spec = weights.load(str(folder))
    tokens = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)
    expected = forward(tensors, tokens)
    for dense in (True, False):         # with thresholds at 0 nothing is skipped
        logits, active = model(torch.from_numpy(tokens)[None], dense=dense)
        np.testing.assert_allclose(logits[0].detach().numpy(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(active.sum(0), torch.full((1, CONTEXT), float(model.dense())))
    assert spec['name'] == 'gpt2' and not model.training
    assert all(float(linear.theta.detach().abs().max()) == 0 == float(linear.sigma.max()) for _, linear in model.gated())
    assert dict(model.named_parameters())['head.weight'].is_contiguous()


def test_half_precision_is_widened(folder):
    tensors = {name: x.astype(np.float16) for name, x in random_release().items()}
    write_safetensors(folder / 'model.safetensors', tensors)
    model, _ = weights.load(str(folder))
    assert model.wpe.weight.dtype == torch.float32
    np.testing.assert_array_equal(model.wpe.weight.detach().numpy(), tensors['wpe.weight'].astype(np.float32))


def test_every_parameter_but_the_thresholds_is_filled_once():
    with torch.device('meta'):
        model = cwic.GPT(cwic.CWICConfig(vocab_size=VOCAB, block_size=CONTEXT, n_layer=LAYERS, n_head=HEADS, n_embd=D))
    filled = [ours for ours, _ in gpt2.layout(model.config).values()]
    assert sorted(filled) == sorted(name for name, _ in model.named_parameters() if not name.endswith('theta'))
    assert list(gpt2.layout(model.config)) == list(random_release())


# -----------------------------------------------------------------------------
# what can be wrong


def test_each_missing_or_turned_tensor_is_named(folder):
    for name, x in random_release().items():
        tensors = random_release()
        del tensors[name]
        write_safetensors(folder / 'model.safetensors', tensors)
        assert f': {name} is missing' in refused(folder)
        tensors[name] = np.ascontiguousarray(x.T) if x.ndim == 2 and x.shape[0] != x.shape[1] else x[:-1]
        write_safetensors(folder / 'model.safetensors', tensors)
        assert f': {name} is torch.float32 {tensors[name].shape} where' in refused(folder)


def test_the_first_wrong_tensor_is_named(folder):
    tensors = random_release()
    tensors['h.1.ln_2.bias'][3] = np.nan
    tensors['ln_f.bias'] = tensors['ln_f.bias'][:5]
    write_safetensors(folder / 'model.safetensors', tensors)
    assert 'h.1.ln_2.bias holds a number that is not finite' in refused(folder)


@pytest.mark.parametrize('change, words', [
    ({'h.2.ln_1.weight': np.ones(D, np.float32)}, 'h.2.ln_1.weight is no part of GPT-2'),
    ({'lm_head.weight': np.ones((VOCAB, D), np.float32)}, 'lm_head.weight differs from wte.weight'),
    ({'wpe.weight': np.ones((CONTEXT, D), bool)}, 'wpe.weight is torch.bool'),
    ({'wpe.weight': np.ones((CONTEXT, D), np.int32)}, "KeyError: 'I32'"),
])
def test_what_is_no_gpt2_is_refused(folder, change, words):
    write_safetensors(folder / 'model.safetensors', random_release() | change)
    assert words in refused(folder)


def test_a_truncated_file_names_the_tensor_it_ends_in(folder):
    path, tensors = folder / 'model.safetensors', random_release()
    whole = path.read_bytes()
    start = len(whole) - sum(x.nbytes for x in tensors.values())
    for name, x in tensors.items():
        path.write_bytes(whole[:start + x.nbytes - 1])
        assert f'truncated in {name}' in refused(folder)
        start += x.nbytes
    for length in (0, 5, 8, 100):
        path.write_bytes(whole[:length])
        assert 'truncated, or not a safetensors file' in refused(folder)


def test_a_header_that_lies_about_sizes_is_refused(folder):
    path = folder / 'model.safetensors'
    for shape, offsets in (([4], [0, 12]), ([2], [-8, 0]), ([2], [8, 0]), ([10 ** 18], [0, 4 * 10 ** 18])):
        text = json.dumps({'wte.weight': {'dtype': 'F32', 'shape': shape, 'data_offsets': offsets}}).encode()
        path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(64))
        assert 'wte.weight' in refused(folder)
    for entry in ({}, [], {'dtype': 'F32', 'shape': ['a'], 'data_offsets': [0, 8]}, {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8, 8]}):
        text = json.dumps({'wte.weight': entry}).encode()
        path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(64))
        assert 'not a safetensors file' in refused(folder)


class Malicious:
    """Unpickled, it makes a directory: as good as any other code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_bin_file_runs_no_code(folder, tmp_path, zipped):
    (folder / 'model.safetensors').unlink()
    path = folder / 'pytorch_model.bin'
    torch.save({'wte.weight': Malicious(tmp_path / 'ran')}, path, _use_new_zipfile_serialization=zipped)
    assert 'nothing in it was run' in refused(folder)
    assert not (tmp_path / 'ran').exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / 'ran').exists()          # so the file would have


@pytest.mark.parametrize('zipped', [True, False])
def test_a_truncated_bin_file_is_one_line(folder, zipped):
    (folder / 'model.safetensors').unlink()
    path = folder / 'pytorch_model.bin'
    write_bin(path, random_release(), _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 50):
        path.write_bytes(whole[:length])
        assert 'pytorch_model.bin: truncated' in refused(folder)
    torch.save([torch.zeros(2)], path)
    assert 'not a dictionary of tensors' in refused(folder)


@pytest.mark.parametrize('change, words', [
    ({'model_type': 'gptj'}, "model_type is 'gptj'"),
    ({'activation_function': 'relu'}, 'activation_function'),
    ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx'),
    ({'n_inner': 40}, 'n_inner'),
    ({'n_ctx': 8}, 'n_ctx'),
    ({'n_head': 5}, 'n_head'),
    ({'n_embd': '12'}, 'not the config.json of a GPT-2'),
    ({'vocab_size': VOCAB + 1}, f'a tokenizer of {VOCAB} ids, but config.json says vocab_size {VOCAB + 1}'),
    ({'n_positions': 8, 'n_ctx': 8}, 'wpe.weight is torch.float32 (16, 12) where floating point (8, 12) belongs'),
    ({'n_layer': 3}, 'h.2.ln_1.weight is missing'),
    ({'n_layer': 1}, 'h.1.ln_1.weight is no part'),
])
def test_another_architecture_is_refused(folder, change, words):
    (folder / 'config.json').write_text(json.dumps(CONFIG | change), encoding='utf-8')
    assert words in refused(folder)


def test_missing_files_are_named(folder, tmp_path):
    (folder / 'model.safetensors').unlink()
    assert 'neither model.safetensors nor pytorch_model.bin' in refused(folder)
    (folder / 'config.json').write_text('[]', encoding='utf-8')
    assert 'not the config.json of a GPT-2' in refused(folder)
    (folder / 'config.json').unlink()
    assert 'config.json' in refused(folder) and 'gpt2-xl' in refused(folder)


def test_a_folder_without_tokenizer_takes_tiktokens_or_says_what_to_fetch(folder, monkeypatch):
    for name in ('vocab.bpe', 'encoder.json'):
        (folder / name).unlink()

    def offline(name):
        raise OSError('no route to host')

    monkeypatch.setattr('tokenizer.tiktoken.get_encoding', offline)
    assert f'vocab.bpe and encoder.json, and put them in {folder}' in refused(folder)


# -----------------------------------------------------------------------------
# downloads, from a folder that stands for the server


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The folder that downloads come from, with a release called gpt2 in it; and an empty cache."""
    (tmp_path / 'server').mkdir()
    release = write_release(tmp_path / 'server' / 'gpt2')
    (release / 'vocab.bpe').rename(release / 'merges.txt')
    (release / 'encoder.json').rename(release / 'vocab.json')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(gpt2, 'URL', (tmp_path / 'server').as_uri() + '/{}/{}')
    return release


def test_a_release_is_downloaded_once(server, capfd):
    model, spec = weights.load('gpt2')
    assert 'downloading model.safetensors of gpt2' in capfd.readouterr().out
    shutil.rmtree(server)
    again, spec_again = weights.load('gpt2')
    assert capfd.readouterr().out == '' and spec == spec_again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_no_network_is_one_line_that_says_what_to_fetch_and_where_to_put_it(server, tmp_path):
    folder = tmp_path / 'home' / 'hub' / 'cwic' / 'gpt2'
    shutil.move(server, tmp_path / 'elsewhere')
    message = refused('gpt2')
    assert all(name in message for name in gpt2.FILES) and f'put them in {folder}' in message
    folder.mkdir(parents=True)
    for name in gpt2.FILES:
        shutil.copy(tmp_path / 'elsewhere' / name, folder / name)
    weights.load('gpt2')


def test_a_download_cut_short_is_noticed_and_started_again(server, capfd):
    """torch.hub keeps what came before a connection broke, and calls it the file."""
    whole = (server / 'model.safetensors').read_bytes()
    (server / 'model.safetensors').write_bytes(whole[:-100])
    assert 'gpt2 arrived damaged and was deleted' in refused('gpt2')
    (server / 'model.safetensors').write_bytes(whole)
    weights.load('gpt2')


def test_files_that_have_arrived_stay(server, tmp_path, capfd):
    (server / 'model.safetensors').rename(tmp_path / 'late')
    assert 'cannot download gpt2' in refused('gpt2')
    capfd.readouterr()
    (tmp_path / 'late').rename(server / 'model.safetensors')
    weights.load('gpt2')
    assert [line.split()[1] for line in capfd.readouterr().out.splitlines()] == ['model.safetensors']


# -----------------------------------------------------------------------------
# the program


def test_released_weights_to_chat_without_data_or_network(folder, tmp_path):
    out = tmp_path / 'out'
    result = run('train.py', '--init_from', str(folder), '--target_reduction', '1', '--max_steps', '0', '--out', str(out), '--data', 'nowhere', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert os.listdir(out) == ['best.pt'] and str(out / 'best.pt') in result.stdout
    model, saved = cwic.load_checkpoint(out / 'best.pt')
    tokens = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)
    np.testing.assert_allclose(model(torch.from_numpy(tokens)[None])[0][0].detach().numpy(), forward(random_release(), tokens), rtol=1e-4, atol=1e-4)
    shutil.rmtree(folder)               # the checkpoint holds all it takes
    result = run('chat.py', '--ckpt', str(out / 'best.pt'), '--prompt', 'the', '--max_tokens', '8', cwd=tmp_path)
    assert result.returncode == 0 and result.stdout, result.stderr


def test_data_of_another_tokenizer_is_one_line(folder, tmp_path):
    data = tmp_path / 'data'
    data.mkdir()
    for split in ('train', 'val'):
        np.zeros(400, np.uint16).tofile(data / f'{split}.bin')
    (data / 'meta.json').write_text(json.dumps({'tokenizer': {'kind': 'bytes'}, 'vocab_size': 257}), encoding='utf-8')
    result = run('train.py', '--init_from', str(folder), '--data', str(data), '--out', str(tmp_path / 'out'))
    assert 'was made with the tokenizer bytes, but the model has gpt2' in one_line(result, 2)


def starting(capsys, **options):
    """starting_model's one line of refusal."""
    with pytest.raises(SystemExit) as exit:
        train.starting_model(train.TrainConfig(**options))
    error = capsys.readouterr().err
    assert exit.value.code and len(error.splitlines()) == 1
    return error


def test_what_a_user_gets_wrong_is_one_line(folder, tmp_path, capsys):
    assert '--n_layer 7' in starting(capsys, init_from=str(folder), n_layer=7)
    assert 'gpt2-large' in starting(capsys, init_from='gpt3')
    assert 'no such checkpoint' in starting(capsys, init_from=str(tmp_path / 'none.pt'))
    model, spec = weights.load(str(folder))
    torch.nn.init.constant_(model.head.theta, 0.1)
    cwic.save_checkpoint(tmp_path / 'sparse.pt', model, tokenizer=spec)
    assert 'is sparse already' in starting(capsys, init_from=str(tmp_path / 'sparse.pt'))
