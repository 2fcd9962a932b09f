"""
Measures a model: how good it is, how many of its weights it uses, and how close it is to its dense teacher.

    python evaluate.py out/best.safetensors                 # on the validation split it was trained with
    python evaluate.py out/best.safetensors --dense         # the same model with every weight in use
    python evaluate.py adapters/smollm2.safetensors --text FILE     # on a text file of yours
    python evaluate.py adapters/smollm2.safetensors --blimp FILE    # grammar: 67 paradigms of 1,000 pairs
    python evaluate.py adapters/smollm2.safetensors --questions FILE    # on its base's answers to questions

An adapter is also compared with its base, the dense model that taught it. Each token is as sparse as in
decoding, and the LM head's weights count. Everything is computed in f32.

BLiMP (Warstadt et al., 2020, github.com/alexwarstadt/blimp) tests grammar with pairs of sentences: a pair is
right if the model finds the good sentence likelier than the bad one, as half of all guesses would be.
--blimp takes the files of its data/ folder joined into one, compressed with xz or not. Each line is a JSON
object with 'sentence_good', 'sentence_bad' and 'UID', the paradigm.

Not here: other benchmarks (see lab/benchmarks.py), and judging the text that a model writes.
"""

import json
import lzma
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass

if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # for torch's threads, as in train.py

import numpy as np
import torch

import weights
from checkpoint import CheckpointError
from cwic import KVCache
from data.common import DataError, load_dataset, load_mix, run
from device import choose_device
from files import LONGEST_JSON, decode_text, open_regular, read_text
from options import SAMPLING, counted, fail, option, parse_options, progress
from sampling import sample
from tokenizer import bos_ids, dialogue_ids, load_tokenizer, start_ids, stop_ids

# logits computed at once, at most: few enough for a CPU's cache, many enough to keep a GPU busy
LOGITS_AT_ONCE = {'cpu': 2 ** 22, 'cuda': 2 ** 28, 'mps': 2 ** 26}
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LONGEST_ANSWER = 90     # tokens
# --questions, --blimp and --text each replace the validation split; these options then mean nothing
UNUSED = {'questions': {'blimp', 'text', 'data', 'only', 'windows', 'dense'},
          'blimp': {'text', 'data', 'only', 'windows'},
          'text': {'data', 'only'}}


@dataclass
class EvaluateConfig:
    about = 'Validation loss, reduction, spread of compute, distance to the dense teacher, BLiMP.'
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
    blimp: str = option('', 'BLiMP as JSON lines, compressed with xz or not')
    blimp_pairs: int = option(1000, 'pairs to read of each paradigm, at most', at_least=1)
    windows: int = option(64, 'windows of text to read, each as long as a training sequence', at_least=1)
    device: str = option('auto', 'auto, cpu, cuda or mps')


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


def percentiles(shares):
    """shares (N,) of all weights, one for each token -> a dict, {'1': the 1st percentile, ...}"""
    return {str(p): float(x) for p, x in zip(PERCENTILES, np.percentile(shares, PERCENTILES))}


def distance(logp, teacher_logp):
    """log p (..., vocab), both -> KL(teacher || student) in nats and top-1 agreement, summed over tokens."""
    kl = (teacher_logp.exp() * (teacher_logp - logp)).sum()
    agreement = (teacher_logp.argmax(-1) == logp.argmax(-1)).sum()
    return float(kl), float(agreement)


@torch.no_grad()
def measure(model, tokens, teacher=None, dense=False, replies=None):
    """
    Reads windows of text, tokens np.int64 (windows, T + 1), in eval mode. Returns a dict:

    val_loss                nats per token
    reduction               the model's weights / the weights that a token uses, on average
    active_share            the share of its weights that each matrix uses, a list as in sparse_layers()
    spread                  standard deviation / mean of the weights that a token uses
    surprise_correlation    of the weights that a token uses with its surprise, -log p before it was read
    entropy_correlation     of the weights that a token uses with the entropy of the prediction that follows
    compute_percentiles     of a token's share of all weights; of the tokens for which replies, bool
                            (windows, T + 1), is True, if it is given and any are
    kl, agreement           with a teacher: KL(teacher || student) in nats per token, and top-1 agreement
    """
    device, training = model.head.weight.device, model.training
    model.eval()
    loss, active_sum, distances = 0.0, 0.0, np.zeros(2)
    shares, surprises, entropies = [], [], []
    batches = np.array_split(tokens, math.ceil(len(tokens) / rows_at_once(model, tokens.shape[1])))
    for batch in counted(batches, f'batches of {len(batches[0])} windows read'):
        batch = torch.from_numpy(batch).to(device)                      # (B, T + 1)
        logits, active = model(batch[:, :-1], dense=dense)              # (B, T, vocab), (M, B, T)
        logp, active = logits.log_softmax(-1), active.cpu().double()    # Apple's GPUs have no doubles
        surprise = -logp.gather(-1, batch[:, 1:, None])[:, :, 0]        # (B, T), of the next token
        entropy = -(logp.exp() * logp).sum(-1)                          # (B, T)
        loss += float(surprise.sum())
        active_sum += active.sum((1, 2))                                # (M,)
        if teacher is not None:
            teacher_logp = teacher(batch[:, :-1], dense=True)[0].log_softmax(-1)
            distances += distance(logp, teacher_logp)
        # the first token of a window is left out: nothing was predicted before it
        shares.append((active.sum(0) / model.n_weights())[:, 1:].flatten())
        surprises.append(surprise[:, :-1].flatten().cpu().double())
        entropies.append(entropy[:, 1:].flatten().cpu().double())
    model.train(training)

    count = tokens.shape[0] * (tokens.shape[1] - 1)
    shares, surprises, entropies = map(torch.cat, (shares, surprises, entropies))
    spread, correlation = float(shares.std() / shares.mean()), torch.eye(3)
    if spread > 1e-9:           # a dense model's is 0, and correlates with nothing
        correlation = torch.corrcoef(torch.stack([shares, surprises, entropies]))
    shown = shares
    if replies is not None and replies[:, 1:-1].any():
        shown = shares[torch.from_numpy(replies[:, 1:-1].flatten())]
    active_share = [float(active) / count / layer.n_weights
                    for active, (_, layer) in zip(active_sum, model.sparse_layers())]
    results = dict(val_loss=loss / count, spread=spread,
                   reduction=float(model.n_weights() * count / active_sum.sum()), active_share=active_share,
                   surprise_correlation=float(correlation[0, 1]),
                   entropy_correlation=float(correlation[0, 2]), compute_percentiles=percentiles(shown))
    if teacher is not None:
        results['kl'], results['agreement'] = (distances / count).tolist()
    return results


@torch.no_grad()
def blimp(model, encoding, start, pairs, dense=False):
    """
    pairs: [(paradigm, good sentence, bad sentence)] -> {paradigm: accuracy}, and the reduction. start: the
    ids that come before each sentence. Sentences of one length are read together, without padding.
    """
    by_length = {}
    for pair, (_, *sentences) in enumerate(pairs):
        for bad, sentence in enumerate(sentences):
            ids = encoding.encode_ordinary(sentence)
            by_length.setdefault(len(ids), []).append((ids, pair, bad))
    batches = []
    for length, sentences in sorted(by_length.items()):
        rows = min(rows_at_once(model, length), 256)
        batches += [sentences[i:i + rows] for i in range(0, len(sentences), rows)]
    scores, active_sum, count = np.zeros((len(pairs), 2)), 0.0, 0      # scores: log p of (good, bad)
    for batch in counted(batches, 'batches of sentences read'):
        tokens = torch.tensor([start + ids for ids, _, _ in batch], device=model.head.weight.device)
        logits, active = model(tokens[:, :-1], dense=dense)                         # (B, T, vocab), (M, B, T)
        logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[:, :, 0]      # (B, T)
        for (_, pair, bad), score in zip(batch, logp.sum(1).tolist()):
            scores[pair, bad] = score
        active_sum, count = active_sum + float(active.sum()), count + tokens[:, 1:].numel()
    right = {}
    for (paradigm, *_), (good, bad) in zip(pairs, scores):
        right.setdefault(paradigm, []).append(good > bad)
    accuracy = {paradigm: float(np.mean(results)) for paradigm, results in right.items()}
    return accuracy, model.n_weights() * count / active_sum


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


@torch.no_grad()
def compare_answers(model, teacher, spec, encoding, questions):
    """
    Compares the models at what a chat is for: the dense teacher answers each question, and both read its
    answers. Returns a dict of kl, agreement and reduction, as in measure(), over the passes that predict
    tokens of answers; questions and tokens, how many there were; and compute_percentiles of the passes that
    read those tokens. Raises DataError if a question does not fit into the context.
    """
    generator, device = torch.Generator().manual_seed(1), model.head.weight.device
    distances, active_sum, count, shares = np.zeros(2), 0.0, 0, []
    for number, question in enumerate(counted(questions, 'questions answered'), 1):
        prompt = dialogue_ids(spec, encoding, [('user', question)])
        if len(prompt) + LONGEST_ANSWER > model.config.block_size:
            raise DataError(f'question {number} has {len(prompt)} tokens, with an answer more than the '
                            f'{model.config.block_size} of the context; shorten it')
        tokens = torch.tensor([answer(teacher, prompt, stop_ids(spec, encoding), generator)], device=device)
        logits, active = model(tokens[:, :-1])
        teacher_logits, _ = teacher(tokens[:, :-1], dense=True)
        first = len(prompt) - 1                                             # the pass that predicts token 1
        logp = logits[0, first:].log_softmax(-1)                            # (T, vocab), T tokens of answer
        distances += distance(logp, teacher_logits[0, first:].log_softmax(-1))
        active = active.sum(0)[0, first:].cpu()                             # (T,)
        active_sum, count = active_sum + float(active.sum()), count + len(logp)
        shares.append(active[1:].double() / model.n_weights())
    kl, agreement = (distances / count).tolist()
    return dict(kl=kl, agreement=agreement, reduction=model.n_weights() * count / active_sum,
                questions=len(questions), tokens=count, compute_percentiles=percentiles(torch.cat(shares)))


# -----------------------------------------------------------------------------
# text to measure on


def read_xz(path):
    """The text of a file compressed with xz. Raises OSError, ValueError, LZMAError or EOFError."""
    with open_regular(path) as compressed, lzma.open(compressed) as file:
        data = file.read(LONGEST_JSON + 1)      # a few bytes may unpack to any number
    if len(data) > LONGEST_JSON:
        raise ValueError(f'more than {LONGEST_JSON:,} bytes')
    return decode_text(data, path)


def read_blimp(path, most):
    """[(paradigm, good, bad)], the first `most` of each paradigm. Raises DataError."""
    progress(f'reading {path}')
    seen, pairs = Counter(), []
    try:
        text = read_xz(path) if path.endswith('.xz') else read_text(path, LONGEST_JSON)
        for row in map(json.loads, filter(str.strip, text.split('\n'))):
            seen[row['UID']] += 1
            if seen[row['UID']] <= most:
                pairs.append((row['UID'], row['sentence_good'], row['sentence_bad']))
    except OSError as error:
        raise DataError(f'{path}: {error.strerror}') from None
    except (ValueError, KeyError, TypeError, RecursionError, lzma.LZMAError, EOFError) as error:
        raise DataError(f'{path}: not BLiMP as JSON lines ({type(error).__name__}: {error})') from None
    if not pairs:
        raise DataError(f'{path}: no pairs of sentences in it')
    return pairs


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
    opening = dialogue_ids(spec, encoding, [('user', '')]) if 'template' in spec else [-1]
    # documents may begin with BOS, too: the first token after it tells
    at = next(i for i, id in enumerate(opening) if id not in bos_ids(spec))
    windows = validation_windows(data, meta, len(data) // meta.get('window', length), length)
    windows = windows[(windows[:, at] == opening[at]) == (kind == 'dialogues')]
    if not len(windows):
        raise DataError(f'no validation windows that are {kind}; read all of them')
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]


# -----------------------------------------------------------------------------
# the command line


def check_options(config, given):
    """Ends the program if an option would be ignored, or is impossible. given: names on the command line."""
    source = next((name for name in UNUSED if getattr(config, name)), '')
    for name in sorted(given & UNUSED.get(source, set())):
        fail(f'--{name} has no use beside --{source}: leave one of them out')
    if 'blimp_pairs' in given and not config.blimp:
        fail('--blimp_pairs has no use without --blimp FILE')
    if len(config.checkpoint) > 1:
        fail('give one checkpoint')
    if config.only not in ('', 'dialogues', 'documents'):
        fail(f'--only {config.only}: choose dialogues or documents')


def chosen_windows(config, options, spec, encoding, block_size):
    """np.int64 (windows, T + 1): the text that config asks for. options: those the model was trained with."""
    length = min(options.get('block_size', 512), block_size)
    if config.text:
        return text_windows(config.text, spec, encoding, config.windows, length)
    data = config.data or options.get('data', 'python')
    if config.only:
        _, tokens, meta = load_dataset(data, length)
        return windows_of_kind(config.only, tokens, meta, spec, encoding, config.windows, length)
    return mix_windows(load_mix(data, length), 'val', config.windows, length)


def evaluate(config, device):
    """The results that config asks for, a dict."""
    path = config.checkpoint[0] if config.checkpoint else 'out/best.safetensors'
    model, saved = weights.load(path)
    model.to(device)
    spec, encoding, teacher = saved['tokenizer'], load_tokenizer(saved['tokenizer']), None
    if saved.get('base') and not config.blimp:
        teacher = weights.load(saved['base'])[0].to(device)
    if config.questions:
        if teacher is None or 'template' not in spec:
            fail(f'--questions: {path} is not an adapter of a chat model; give one, such as '
                 'adapters/smollm2.safetensors')
        return compare_answers(model, teacher, spec, encoding, read_questions(config.questions))
    if config.blimp:
        pairs = read_blimp(config.blimp, config.blimp_pairs)
        by_paradigm, reduction = blimp(model, encoding, start_ids(spec, encoding), pairs, config.dense)
        return dict(blimp=float(np.mean(list(by_paradigm.values()))), reduction=reduction, pairs=len(pairs),
                    by_paradigm=by_paradigm)
    tokens = chosen_windows(config, saved.get('options', {}), spec, encoding, model.config.block_size)
    return dict(measure(model, tokens, teacher, config.dense, in_replies(tokens, spec)), windows=len(tokens),
                length=tokens.shape[1] - 1)


def main():
    config, given = parse_options(EvaluateConfig, 'python evaluate.py')
    check_options(config, given)
    device, start = choose_device(config.device), time.time()
    try:
        results = evaluate(config, device)
    except (CheckpointError, weights.WeightsError) as error:
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
