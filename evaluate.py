"""
Measures a model: how good it is, how many of its weights it uses, and how close it is to its dense teacher.

    python evaluate.py out/best.safetensors                 # on the validation split it was trained with
    python evaluate.py out/best.safetensors --dense         # the same model with every weight in use
    python evaluate.py adapters/smollm2.safetensors --text FILE     # on a text file of yours
    python evaluate.py adapters/smollm2.safetensors --questions FILE    # on its base's answers to questions

An adapter is also compared with its base, the dense model that taught it. Each token is as sparse as in
decoding, and the LM head's weights count. Everything is computed in f32.

Not here: benchmarks (lab/benchmarks.py), and judging the text that a model writes.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # for torch's threads, as in train.py

import numpy as np
import torch

import weights
from checkpoint import CheckpointError
from cwic import KVCache
from data.common import DataError, load_dataset, load_mix, run
from device import choose_device
from files import read_text
from options import SAMPLING, counted, fail, option, parse_options, progress
from sampling import sample
from tokenizer import bos_ids, dialogue_ids, load_tokenizer, stop_ids

# logits computed at once, at most: few enough for a CPU's cache, many enough to keep a GPU busy
LOGITS_AT_ONCE = {'cpu': 2 ** 22, 'cuda': 2 ** 28, 'mps': 2 ** 26}
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LONGEST_ANSWER = 90     # tokens


@dataclass
class EvaluateConfig:
    about = 'Validation loss, reduction, spread of compute, and distance to the dense teacher.'
    checkpoint: tuple = option((), 'a checkpoint, an adapter, a folder of weights, or the name of a model '
                               '(out/best.safetensors)')
    json: bool = option(False, 'print one JSON object')
    dense: bool = option(False, 'use every weight')
    data: str = option('', 'a folder in data/, or a mix of several, whose validation split to '
                       'read; else what it was trained on')
    only: str = option('', "read only the dialogues, or only the documents, of a chat model's data")
    text: str = option('', 'read this UTF-8 text file instead')
    questions: str = option('', 'a file with one question on each line: compare an adapter with its base on '
                            'the answers that the base gives')
    windows: int = option(64, 'windows of text to read, each as long as a training sequence', at_least=1)
    device: str = option('auto', 'auto, cpu, cuda or mps')


# -----------------------------------------------------------------------------
# measuring


def rows_at_once(model, length):
    """How many sequences of this length (tokens) fit into LOGITS_AT_ONCE; at least one."""
    device = model.head.weight.device.type
    return max(1, LOGITS_AT_ONCE[device] // (length * model.config.vocab_size))


def in_replies(tokens, spec):
    """
    tokens: windows of text, np.int64 (windows, T) -> bool (windows, T), True for tokens that the assistant
    says: after the words of the chat template that open a reply, and before the stop token. If a window
    begins inside a dialogue, nobody knows who says its first tokens: they are False.
    """
    replies = np.zeros(tokens.shape, bool)
    if 'template' not in spec:
        return replies
    encoding = load_tokenizer(spec)
    opening, stops = dialogue_ids(spec, encoding, [], begin=False), stop_ids(spec, encoding)
    for window, row in zip(tokens.tolist(), replies):
        speaking = False
        for i, id in enumerate(window):
            opened = i >= len(opening) and window[i - len(opening):i] == opening
            speaking = (speaking or opened) and id not in stops
            row[i] = speaking
    return replies


class Passes(NamedTuple):
    """What passes over B rows of T tokens show, as tensors; all but the first are (B, T)."""
    active: torch.Tensor            # (matrices, B, T): the weights that each matrix used
    surprise: torch.Tensor          # -log p of the token that follows, nats
    entropy: torch.Tensor           # of the prediction, nats
    gain: torch.Tensor = None       # with a teacher: by how much its surprise is lower, nats
    kl: torch.Tensor = None         # KL(teacher || model), nats
    agrees: torch.Tensor = None     # 1.0 if both find the same token likeliest, else 0.0


@torch.no_grad()
def read_rows(model, tokens, teacher=None, dense=False):
    """Passes over all but the last of tokens (B, T + 1), on the model's device. The teacher runs dense."""
    logits, active = model(tokens[:, :-1], dense=dense)                             # (B, T, vocab)
    logp, follows = logits.log_softmax(-1), tokens[:, 1:, None]
    surprise = -logp.gather(-1, follows)[:, :, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    if teacher is None:
        return Passes(active, surprise, entropy)
    teacher_logp = teacher(tokens[:, :-1], dense=True)[0].log_softmax(-1)
    gain = surprise + teacher_logp.gather(-1, follows)[:, :, 0]
    kl = (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)
    agrees = (teacher_logp.argmax(-1) == logp.argmax(-1)).float()
    return Passes(active, surprise, entropy, gain, kl, agrees)


def percentiles(shares):
    """shares (N,) of all weights, one for each token -> a dict, {'1': the 1st percentile, ...}"""
    return {str(p): float(x) for p, x in zip(PERCENTILES, np.percentile(shares, PERCENTILES))}


def measure(model, tokens, teacher=None, dense=False, replies=None):
    """
    Reads windows of text, tokens np.int64 (windows, T + 1). Returns a dict:

    val_loss                nats per token
    reduction               the model's weights / the weights that a token uses, on average
    active_share            the share of its weights that each matrix uses, a list as in sparse_layers()
    spread                  standard deviation / mean of the weights that a token uses
    surprise_correlation    of the weights that a token uses with its surprise, -log p before it was read
    entropy_correlation     of the weights that a token uses with the entropy of the prediction that follows
    compute_percentiles     of a token's share of all weights; of the tokens for which replies, bool
                            (windows, T + 1), is True, if it is given and any are
    kl, agreement           with a teacher: KL(teacher || model) in nats per token, and top-1 agreement
    """
    loss, active_sum, kl, agreement, used = 0.0, 0.0, 0.0, 0.0, []
    batches = np.array_split(tokens, math.ceil(len(tokens) / rows_at_once(model, tokens.shape[1])))
    for batch in counted(batches, f'batches of {len(batches[0])} windows read'):
        found = read_rows(model, torch.from_numpy(batch).to(model.head.weight.device), teacher, dense)
        active = found.active.cpu().double()                            # Apple's GPUs have no doubles
        active_sum += active.sum((1, 2))                                # (matrices,)
        loss += float(found.surprise.sum())
        if teacher is not None:
            kl, agreement = kl + float(found.kl.sum()), agreement + float(found.agrees.sum())
        # the first token of a window is left out: nothing was predicted before it
        used.append(torch.stack([(active.sum(0) / model.n_weights())[:, 1:],
                                 found.surprise[:, :-1].cpu().double(),
                                 found.entropy[:, 1:].cpu().double()]).flatten(1))
    used = torch.cat(used, 1)                                           # (3, tokens)
    shares, count = used[0], tokens.shape[0] * (tokens.shape[1] - 1)
    spread, correlation = float(shares.std() / shares.mean()), torch.eye(3)
    if spread > 1e-9:           # a dense model's is 0, and correlates with nothing
        correlation = torch.corrcoef(used)
    if replies is not None and replies[:, 1:-1].any():
        shares = shares[torch.from_numpy(replies[:, 1:-1].flatten())]
    active_share = [float(active) / count / layer.n_weights
                    for active, (_, layer) in zip(active_sum, model.sparse_layers())]
    results = dict(val_loss=loss / count, spread=spread,
                   reduction=float(model.n_weights() * count / active_sum.sum()), active_share=active_share,
                   surprise_correlation=float(correlation[0, 1]),
                   entropy_correlation=float(correlation[0, 2]), compute_percentiles=percentiles(shares))
    if teacher is not None:
        results.update(kl=kl / count, agreement=agreement / count)
    return results


@torch.no_grad()
def answer(teacher, prompt, stops, generator):
    """The ids of a prompt and of a dense model's answer, sampled as in chat.py, stop token included."""
    tokens, device = list(prompt), teacher.head.weight.device
    cache = KVCache(teacher.config, device=device)
    for _ in range(LONGEST_ANSWER):
        logits, _ = teacher(torch.tensor([tokens[cache.length:]], device=device), cache, dense=True)
        point = torch.rand(1, generator=generator).to(device)
        said = torch.tensor([tokens[len(prompt):]], dtype=torch.long, device=device)
        tokens.append(int(sample(logits[:, -1], point, said=said, **SAMPLING)[0]))
        if tokens[-1] in stops:
            break
    return tokens


def compare_answers(model, teacher, spec, encoding, questions):
    """
    Compares the models at what a chat is for: the dense teacher answers each question, and both read its
    answers. Returns a dict of kl, agreement and reduction, as in measure(), over the passes that predict
    tokens of answers; questions and tokens, how many there were; and compute_percentiles of the passes that
    read those tokens. Raises DataError if a question does not fit into the context.
    """
    generator, predicting, reading = torch.Generator().manual_seed(1), [], []
    for number, question in enumerate(counted(questions, 'questions answered'), 1):
        prompt = dialogue_ids(spec, encoding, [('user', question)])
        if len(prompt) + LONGEST_ANSWER > model.config.block_size:
            raise DataError(f'question {number} has {len(prompt)} tokens, with an answer more than the '
                            f'{model.config.block_size} of the context; shorten it')
        tokens = answer(teacher, prompt, stop_ids(spec, encoding), generator)
        found = read_rows(model, torch.tensor([tokens], device=model.head.weight.device), teacher)
        share = found.active.sum(0) / model.n_weights()
        passes = torch.cat([share, found.kl, found.agrees]).cpu().double()              # (3, T)
        predicting.append(passes[:, len(prompt) - 1:])      # its first pass reads the prompt's last token
        reading.append(share[0, len(prompt):].cpu())
    share, kl, agreement = torch.cat(predicting, 1).mean(1).tolist()
    return dict(kl=kl, agreement=agreement, reduction=1 / share, questions=len(questions),
                tokens=sum(passes.shape[1] for passes in predicting),
                compute_percentiles=percentiles(torch.cat(reading)))


# -----------------------------------------------------------------------------
# text to measure on


def read_file(path):
    """The text of a file. Raises DataError."""
    try:
        return read_text(path)
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror})') from None
    except ValueError as error:
        raise DataError(str(error)) from None


def read_questions(path):
    """The lines of a text file, without empty ones. Raises DataError."""
    questions = [line.strip() for line in read_file(path).split('\n') if line.strip()]
    if not questions:
        raise DataError(f'{path}: no questions in it')
    return questions


def text_windows(path, spec, encoding, count, length):
    """np.int64 (windows, length + 1): at most `count` windows, spread over a text file. Raises DataError."""
    progress(f'tokenizing {path}')
    ids = np.array(bos_ids(spec) + encoding.encode_ordinary(read_file(path)), np.int64)
    if len(ids) <= length:
        raise DataError(f'{path}: {len(ids)} tokens are fewer than one window of {length}')
    starts = np.unique(np.linspace(0, len(ids) - length - 1, count).astype(np.int64) // length * length)
    return np.stack([ids[start:start + length + 1] for start in starts])


def validation_windows(data, meta, count, length):
    """
    np.int64 (count, T + 1): `count` windows of a data set's validation split, evenly spread, so always the
    same ones. T is `length`, unless the data set is made of independent windows. No token follows the last
    one of such a window, so T + 1 is at most their length.
    """
    stride = meta.get('window', 1)
    length = min(length, meta.get('window', length + 1) - 1)
    starts = stride * np.linspace(0, (len(data) - length - 1) // stride, count).astype(np.int64)
    return np.stack([data[start:start + length + 1] for start in starts]).astype(np.int64)


def mix_windows(mix, split, count, length):
    """
    The same of a mix of data sets, of each as many as its share: np.int64 (count, T + 1). split: 'train' or
    'val'. T is that of the data set with the shortest windows.
    """
    counts = np.diff(np.rint(count * np.cumsum([0] + [part.share for part in mix])).astype(int))
    parts = [validation_windows(getattr(part, split), part.meta, n, length)
             for part, n in zip(mix, counts) if n]
    shortest = min(windows.shape[1] for windows in parts)
    return np.concatenate([windows[:, :shortest] for windows in parts])


def windows_of_kind(kind, data, meta, spec, encoding, count, length):
    """
    As validation_windows(), but of a chat model's data only the 'dialogues', which begin with its template,
    or only the 'documents', which do not. Raises DataError if there are none.
    """
    if kind not in ('dialogues', 'documents'):
        raise DataError(f'--only {kind}: choose dialogues or documents')
    opening = dialogue_ids(spec, encoding, [('user', '')]) if 'template' in spec else [-1]
    # documents may begin with BOS, too: the first token after it tells
    at = next(i for i, id in enumerate(opening) if id not in bos_ids(spec))
    windows = validation_windows(data, meta, len(data) // meta.get('window', length), length)
    windows = windows[(windows[:, at] == opening[at]) == (kind == 'dialogues')]
    if not len(windows):
        raise DataError(f'no validation windows that are {kind}; read all of them')
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]


def data_windows(name, only, spec, encoding, count, length):
    """
    np.int64 (windows, T + 1): at most `count` validation windows of a data set or a mix. only: '', or as in
    windows_of_kind(), and then a mix is refused. Raises DataError.
    """
    mix = load_mix(name, length)
    if mix[0].meta['tokenizer'] != spec:
        raise DataError(f'data/{mix[0].name} was made with another tokenizer than the model has; name '
                        'another: --data NAME')
    if not only:
        return mix_windows(mix, 'val', count, length)
    _, data, meta = load_dataset(name, length)
    return windows_of_kind(only, data, meta, spec, encoding, count, length)


# -----------------------------------------------------------------------------
# the command line


def evaluate(config, device):
    """The results that config asks for, a dict."""
    path = config.checkpoint[0] if config.checkpoint else 'out/best.safetensors'
    model, saved = weights.load(path)
    model.to(device)
    spec, encoding = saved['tokenizer'], load_tokenizer(saved['tokenizer'])
    teacher = weights.load(saved['base'])[0].to(device) if saved.get('base') else None
    if config.questions:
        if teacher is None or 'template' not in spec:
            fail(f'--questions: {path} is not an adapter of a chat model; give one, such as '
                 'adapters/smollm2.safetensors')
        return compare_answers(model, teacher, spec, encoding, read_questions(config.questions))
    options = saved.get('options', {})
    length = min(options.get('block_size', 512), model.config.block_size)
    if config.text:
        tokens = text_windows(config.text, spec, encoding, config.windows, length)
    else:
        name = config.data or options.get('data', 'python')
        tokens = data_windows(name, config.only, spec, encoding, config.windows, length)
    return dict(measure(model, tokens, teacher, config.dense, in_replies(tokens, spec)), windows=len(tokens),
                length=tokens.shape[1] - 1)


def main():
    config, _ = parse_options(EvaluateConfig, 'python evaluate.py')
    if len(config.checkpoint) > 1:
        fail('give one checkpoint')
    if [config.data, config.text, config.questions].count('') < 2:
        fail('give one of --data, --text and --questions')
    if config.questions and config.dense:
        fail('--questions compares an adapter with its dense base: leave --dense out')
    device, start = choose_device(config.device), time.time()
    try:
        results = evaluate(config, device)
    except CheckpointError as error:
        fail(error, 1)
    if config.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        if isinstance(value, float):
            print(f'{name:22}{value:.4f}')
        elif isinstance(value, int):
            print(f'{name:22}{value}')
    print(f'{time.time() - start:.0f} s on {device}', file=sys.stderr)


if __name__ == '__main__':
    run(main)
