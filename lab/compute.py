"""
Where the compute goes: to which tokens, at which positions, in which matrices, and what it gains.

    python lab/compute.py out/best.safetensors
    python lab/compute.py adapters/smollm2.safetensors --data heldout --only dialogues --picture tokens.png

Reads validation text and measures, for every token, the share of the weights used in the pass over it, how
surprising the token was, how sure the model is of the next one, and how much better the dense model predicts
that. An adapter's dense model is its base.

A regular expression finds each token's kind: rough, but the same for every model. In prose, function words
are those of a list, and names are words with a capital inside a sentence.

Not here: causes. Correlations do not tell what makes the model spend compute.
"""

import keyword
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the repository, for the imports below

import plots
import weights
from checkpoint import CheckpointError
from data.common import run
from device import choose_device
from evaluate import data_windows, read_rows, rows_at_once
from lab.methods import hooked
from options import counted, fail, option, parse_options
from tokenizer import load_tokenizer


@dataclass
class ComputeConfig:
    about = 'Which tokens of validation text get compute, at which positions, and in which matrices.'
    checkpoint: tuple = option((), 'a checkpoint or an adapter (out/best.safetensors)')
    data: str = option('', 'folder in data/; left out: the checkpoint\'s training data')
    only: str = option('', "read only the dialogues, or only the documents, of a chat model's data")
    windows: int = option(64, 'windows of text', at_least=1)
    picture: str = option('', 'file for a picture; left out: none is drawn')
    device: str = option('auto', 'auto, cpu, cuda or mps')


# -----------------------------------------------------------------------------
# kinds of tokens

PYTHON = re.compile(r"""(?P<comment>\#[^\n]*)
    |(?P<string>[rbfu]?(\"{3}[\s\S]*?(\"{3}|$)|'{3}[\s\S]*?('{3}|$)|"(\\.|[^"\\\n])*"?|'(\\.|[^'\\\n])*'?))
    |(?P<indentation>\n[ \t]*)|(?P<number>\d[\w.]*)|(?P<name>\w+)|(?P<space>[ \t]+)|(?P<operator>[\s\S])
    """, re.X)
# the system's turn counts as template, too: it is the same in every dialogue
PROSE = re.compile(r"""(?P<template><\|\w+\|>system[\s\S]*?<\|\w+\|>\n?|<\|\w+\|>(user|assistant)?\n?)
    |(?P<digits>\d+)|(?P<name>[^\W\d]\w*)|(?P<space>\s+)|(?P<punctuation>[\s\S])""", re.X)
FUNCTION_WORDS = set("""
    a about all also am an and any are as at be because been but by can could d did do does for from had
    has have he her his how i if in into is it its just like ll m may me more my no not of on one or our out
    other re s she should so some such t than that the their them then there these they this to up us ve was
    we were what when where which who will with would you your""".split())


def kinds_of_tokens(pieces, pattern):
    """
    pieces: the bytes of each token of a window -> the kind of each, that of its first character that is no
    space. If a window begins inside a string, inside and outside are swapped up to its next string.
    """
    text = b''.join(pieces).decode('utf-8', 'surrogateescape')
    kinds, seen = [], set()             # kinds: one for each byte
    for match in pattern.finditer(text):
        kind, word = match.lastgroup, match.group()
        before = text[max(match.start() - 2, 0):match.start()]
        if kind == 'name' and pattern is PYTHON:
            kind = ('keyword' if keyword.iskeyword(word) else
                    'name seen before' if word in seen else 'new name')
        elif kind == 'name':
            kind = ('function word' if word.lower() in FUNCTION_WORDS else
                    'name' if word[0].isupper() and re.fullmatch(r'[\w,;] ', before) else 'content word')
        seen.add(word)
        kinds += [kind] * len(word.encode('utf-8', 'surrogateescape'))
    ends = np.cumsum([len(piece) for piece in pieces])
    firsts = [end - max(len(piece.lstrip(b' ')), 1) for end, piece in zip(ends, pieces)]
    return ['first token', *(kinds[first] for first in firsts[1:])]


# -----------------------------------------------------------------------------
# measuring


@torch.no_grad()
def measure(model, teacher, windows):
    """
    Reads windows of text, np.int64 (windows, T + 1). teacher: the dense model. Returns a dict:

    share (windows, T)      share of all weights that the pass over a token used
    loss, entropy           of that pass's prediction, in nats; loss[:, :-1] is the surprise of tokens 1 on
    gain                    loss - the teacher's loss: what every weight would have gained
    active_share            share of each matrix's weights that was used, as in GPT.sparse_layers()
    heads (layers, heads)   how often nothing of an attention head's output is used
    """
    n_head, heads = model.config.n_head, {block.attn.out: 0 for block in model.blocks}

    def count_unused(out, args):
        x, dense = args                                                         # (B, T, d)
        if not dense:       # a model without a base is its own teacher
            m = (x.float() - out.mu).abs() > out.thresholds()[:, None, None]                # (n, B, T, d)
            used = m.any(0).unflatten(2, (n_head, -1)).any(3)                               # (B, T, heads)
            heads[out] = heads[out] + (~used).sum((0, 1))

    tokens, active_sum = [], 0
    batches = torch.from_numpy(windows).split(rows_at_once(model, windows.shape[1]))
    for batch in counted(batches, f'batches of {len(batches[0])} windows read'):
        with hooked([(out, count_unused) for out in heads]):
            found = read_rows(model, batch.to(model.head.weight.device), teacher)
        share = found.active.sum(0) / model.n_weights()
        tokens.append(torch.stack([x.cpu().double()
                                   for x in (share, found.surprise, found.entropy, found.gain)]))
        active_sum = active_sum + found.active.sum((1, 2)).cpu()
    share, loss, entropy, gain = torch.cat(tokens, 1).numpy()
    return {'share': share, 'loss': loss, 'entropy': entropy, 'gain': gain,
            'active_share': [float(active) / share.size / layer.n_weights
                             for active, (_, layer) in zip(active_sum, model.sparse_layers())],
            'heads': torch.stack([*heads.values()]).cpu().numpy() / share.size}


# -----------------------------------------------------------------------------
# reporting


def by_kind(kinds, found):
    """
    kinds (windows, T), one for each token -> [(kind, tokens, mean compute, mean surprise, mean gain)], most
    compute first
    """
    surprise = np.full_like(found['loss'], np.nan)          # the first token has none
    surprise[:, 1:] = found['loss'][:, :-1]
    rows = [(kind, int(which.sum()), *(float(values[which].mean()) for values in
                                       (found['share'], surprise, found['gain'])))
            for kind in np.unique(kinds) for which in [kinds == kind]]
    return sorted(rows, key=lambda row: -row[2])


def by_position(share):
    """[(first position, last, mean compute)], in intervals that double"""
    length = share.shape[1]
    bounds = [0, *(2 ** i for i in range(20) if 2 ** i < length), length]
    return [(low, high - 1, float(share[:, low:high].mean())) for low, high in zip(bounds, bounds[1:])]


def by_value(values, share, bins=10):
    """[(mean value, mean compute, its 10th percentile, its 90th)] of equal groups of tokens, by value"""
    order = np.argsort(values, axis=None, kind='stable')
    return [(float(values.flat[some].mean()), float(share.flat[some].mean()),
             *np.percentile(share.flat[some], (10, 90)).tolist()) for some in np.array_split(order, bins)]


def correlations(found, which):
    """-> {name: correlation with compute} over the tokens in `which`, bool (windows, T), but no first ones"""
    which = which[:, 1:]
    share = found['share'][:, 1:][which]
    values = {'surprise of the token read': found['loss'][:, :-1],
              'entropy of the prediction': found['entropy'][:, 1:],
              'loss of the prediction': found['loss'][:, 1:],
              'what every weight would gain': found['gain'][:, 1:]}
    return {name: float(np.corrcoef(share, x[which])[0, 1]) if share.std() > 1e-9 else 0.0
            for name, x in values.items()}


def show(found, kinds, pieces, matrices):
    """Prints everything. pieces: the bytes of each token, window by window; matrices: their names."""
    share = found['share']
    print(f'{share.size:,} tokens, which use {share.mean():.1%} of the weights (standard deviation: '
          f'{share.std():.1%})\n')
    print('by kind of token                  tokens  compute   surprise   every weight would gain, nats')
    for kind, count, compute, surprise, gain in by_kind(kinds, found):
        print(f'{kind:30}{count:10,}{compute:9.1%}{surprise:11.2f}{gain:11.3f}')
    print('\ncorrelation of compute with                        without template')
    without = correlations(found, kinds != 'template')
    for name, value in correlations(found, kinds != '').items():
        print(f'{name:30}{value:+19.2f}{without[name]:+11.2f}')
    print('\nby layer and matrix: share of its weights\n' + ''.join(f'{name:>9}' for name in matrices))
    used, count = [f'{part:9.1%}' for part in found['active_share']], len(matrices)
    print('\n'.join(''.join(used[i:i + count]) for i in range(0, len(used), count)) + '  head')
    heads = found['heads']
    layer, head = np.unravel_index(heads.argmax(), heads.shape)
    print(f'\nattention heads of whose output nothing is used: {heads.mean():.1%} of the time; most often '
          f'head {head} of layer {layer}, {heads.max():.1%}')
    order = np.argsort(share[:, 1:], axis=None, kind='stable')
    for label, places in (('least', order[:12]), ('most', order[:-13:-1])):
        print(f'\n{label} expensive, in context')
        for window, t in zip(*np.unravel_index(places, share[:, 1:].shape)):
            before, token = (repr(b''.join(some).decode('utf-8', 'replace'))[1:-1] for some in
                             (pieces[window][max(t - 11, 0):t + 1], pieces[window][t + 1:t + 2]))
            print(f'{share[window, t + 1]:6.1%}  {before[-60:]:>60} [{token}]')


def main():
    config, _ = parse_options(ComputeConfig, 'python lab/compute.py')
    path = config.checkpoint[0] if config.checkpoint else 'out/best.safetensors'
    if len(config.checkpoint) > 1:
        fail('give one checkpoint')
    if config.picture:
        plots.check_picture(config.picture)
    try:
        model, saved = weights.load(path)
        teacher = weights.load(saved['base'])[0] if saved.get('base') else model
    except CheckpointError as error:
        fail(error, 1)
    options, spec = saved.get('options') or {}, saved['tokenizer']
    length = min(options.get('block_size', 512), model.config.block_size)
    encoding = load_tokenizer(spec)
    bytes_of = encoding.decode_single_token_bytes
    windows = data_windows(config.data or options.get('data', 'python'), config.only, spec, encoding,
                           config.windows, length)
    pieces = [[bytes_of(token) for token in window] for window in windows[:, :-1].tolist()]
    pattern = PROSE if 'template' in spec else PYTHON
    kinds = np.array([kinds_of_tokens(of_window, pattern) for of_window in pieces])         # (windows, T)
    device = choose_device(config.device)
    found, matrices = measure(model.to(device), teacher.to(device), windows), model.config.matrices
    show(found, kinds, pieces, matrices)
    if config.picture:
        by_surprise = by_value(found['loss'][:, :-1], found['share'][:, 1:])
        plots.tokens(by_kind(kinds, found), by_position(found['share']), by_surprise, found['active_share'],
                     matrices, config.picture)
        print(f'\npicture: {config.picture}')


if __name__ == '__main__':
    run(main)
