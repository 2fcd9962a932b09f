"""
How good a model is, at what compute, and how close to its dense teacher.

    python evaluate.py out/best.safetensors                 # on the validation split it was trained with
    python evaluate.py out/best.safetensors --dense         # the same model with every weight
    python evaluate.py adapters/smollm2.safetensors --text FILE     # on a text file of yours
    python evaluate.py adapters/smollm2.safetensors --blimp FILE    # grammar: 67 paradigms of 1,000 pairs
    # on its base's answers to people
    python evaluate.py adapters/smollm2.safetensors --questions data/questions.txt

An adapter is also compared with its base, the dense model it learned from. Every token counts, the LM head's
compute included, and every token is as sparse as it is in decoding; all in f32.

BLiMP (Warstadt et al., 2020, github.com/alexwarstadt/blimp) is one JSON object a line, with 'sentence_good',
'sentence_bad' and 'UID', the paradigm; --blimp takes the files of its data/ folder one after the other in one
file, packed with xz or not. A pair is right where the good sentence is the likelier; chance is a half.

Not here: benchmarks in which what a model writes is judged.
"""

import json
import lzma
import math
import os
import sys
import time
from dataclasses import dataclass

if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # of torch's threads, as in train.py

import numpy as np
import torch

import weights
from checkpoint import CheckpointError
from cwic import KVCache, sample
from data.common import DataError, load_dataset, load_mix, run
from device import choose_device
from files import LONGEST_JSON, decode_text, open_regular, read_text
from options import SAMPLING, counted, fail, option, parse_options, progress
from tokenizer import TokenizerError, bos_ids, dialogue_ids, load_tokenizer, start_ids, stop_ids

# no more logits than this, or one sequence's, exist at a time: what a CPU's cache likes, what a GPU needs
LOGITS_AT_ONCE = {'cpu': 2 ** 22, 'cuda': 2 ** 28, 'mps': 2 ** 26}
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LONGEST_ANSWER = 90     # tokens


@dataclass
class EvaluateConfig:
    about = 'Validation loss, reduction, spread of compute, distance to the dense teacher, BLiMP.'
    checkpoint: tuple = option((), 'what weights.load takes: a checkpoint, an adapter, a name '
                               '(out/best.safetensors)')
    json: bool = option(False, 'print one JSON object')
    dense: bool = option(False, 'use every weight')
    data: str = option('', 'folder in data/, or a mix of several, whose validation split is read; else what '
                       'it was trained with')
    only: str = option('', "of a chat model's text: dialogues, or documents; else both")
    text: str = option('', 'a UTF-8 text file to read instead')
    questions: str = option('', 'a file of questions, one on each line: an adapter is compared with its '
                            'base on the answers that the base gives')
    blimp: str = option('', 'BLiMP as JSON lines, packed with xz or not')
    blimp_pairs: int = option(1000, 'of each paradigm, the first so many', at_least=1)
    windows: int = option(64, 'windows of text, each as long as the training windows were', at_least=1)
    device: str = option('auto', 'auto, cpu, cuda or mps')


def rows_at_once(model, length):
    """How many sequences of a length (tokens) may be read at once."""
    device = model.head.weight.device.type
    return max(1, LOGITS_AT_ONCE[device] // (length * model.config.vocab_size))


def in_replies(tokens, spec):
    """
    tokens: windows of text, np.int64 (windows, T) -> which of them are an assistant's, bool (windows, T):
    those between the words of the chat template that open a reply and the stop token. A window may begin
    within a dialogue; its tokens before the first opening are left out, as nobody knows whose they are.
    """
    if 'template' not in spec:
        return np.zeros(tokens.shape, bool)
    encoding = load_tokenizer(spec)
    opening = dialogue_ids(spec, encoding, [], begin=False)
    opened = np.ones(tokens.shape, bool)        # whether an opening ends at a token
    opened[:, :len(opening) - 1] = False
    for back, id in enumerate(reversed(opening)):
        opened &= np.roll(tokens, back, 1) == id
    position = np.arange(1, tokens.shape[1] + 1)
    stopped = np.isin(tokens, list(stop_ids(spec, encoding)))
    last_opened, last_stopped = (np.maximum.accumulate(position * event, 1) for event in (opened, stopped))
    return (last_opened > last_stopped) & ~opened


def percentiles(shares):
    """shares (N,) of dense compute, of single tokens -> a dict, {'5': the 5th percentile, ...}"""
    return {str(p): float(x) for p, x in zip(PERCENTILES, np.percentile(shares, PERCENTILES))}


@torch.no_grad()
def measure(model, tokens, teacher=None, dense=False, replies=None):
    """
    Reads windows of text, tokens np.int64 (windows, T + 1), in eval mode and f32. Returns a dict: val_loss
    (nats per token), reduction, active_share (of each matrix's weights, in the order of sparse_layers()), spread (the
    standard deviation of the compute of a token, over its mean), compute_percentiles (of a token's share of
    dense compute), and the correlation of a token's compute with the surprise of that token (-log p, given
    before it was read) and with the entropy of what is predicted from it. With a teacher also kl,
    KL(teacher || student) in nats, and agreement, how often both find the same token likeliest. replies, bool
    (windows, T + 1): the percentiles are only of tokens for which it is True, if there are any.
    """
    device, training = model.head.weight.device, model.training
    model.eval()
    sums, shares, entropies, surprises = {'loss': 0, 'active': 0, 'kl': 0, 'agreement': 0}, [], [], []
    batches = np.array_split(tokens, math.ceil(len(tokens) / rows_at_once(model, tokens.shape[1])))
    for batch in counted(batches, f'batches of {len(batches[0])} windows read'):
        batch = torch.from_numpy(batch).to(device)
        logits, active = model(batch[:, :-1], dense=dense)              # (B, T, vocab), (matrices, B, T)
        logp, active = logits.log_softmax(-1), active.cpu().double()    # not every GPU has doubles
        surprise = -logp.gather(-1, batch[:, 1:, None])[:, :, 0]        # (B, T), of the token that follows
        entropy = -(logp.exp() * logp).sum(-1)                          # (B, T)
        sums['loss'] += float(surprise.sum())
        sums['active'] += active.sum((1, 2))
        if teacher is not None:
            teacher_logp = teacher(batch[:, :-1], dense=True)[0].log_softmax(-1)
            sums['kl'] += float((teacher_logp.exp() * (teacher_logp - logp)).sum())
            sums['agreement'] += float((teacher_logp.argmax(-1) == logp.argmax(-1)).sum())
        shares.append((active.sum(0) / model.n_weights())[:, 1:].flatten())     # the first token surprises nobody
        entropies.append(entropy[:, 1:].flatten().cpu().double())
        surprises.append(surprise[:, :-1].flatten().cpu().double())
    model.train(training)
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    shares, entropies, surprises = map(torch.cat, (shares, entropies, surprises))
    spread, with_surprise, with_entropy = float(shares.std() / shares.mean()), 0.0, 0.0
    if spread > 1e-9:
        correlations = torch.corrcoef(torch.stack([shares, surprises, entropies]))
        with_surprise, with_entropy = correlations[0, 1:].tolist()
    shown = shares
    if replies is not None and replies[:, 1:-1].any():
        shown = shares[torch.from_numpy(replies[:, 1:-1].flatten())]
    results = dict(val_loss=sums['loss'] / count, spread=spread,
                   reduction=float(model.n_weights() * count / sums['active'].sum()),
                   active_share=[float(active) / count / layer.n_weights
                                 for active, (_, layer) in zip(sums['active'], model.sparse_layers())],
                   surprise_correlation=with_surprise, entropy_correlation=with_entropy,
                   compute_percentiles=percentiles(shown))
    if teacher is not None:
        results.update(kl=sums['kl'] / count, agreement=sums['agreement'] / count)
    return results


@torch.no_grad()
def blimp(model, encoding, start, pairs, dense=False):
    """
    pairs: [(paradigm, good sentence, bad sentence)] -> (accuracy of each paradigm, a dict; dense / active
    weights over all tokens read). start: the ids that come before each sentence. Sentences of one length are
    read together, without padding.
    """
    device = model.head.weight.device
    sentences = sorted(((encoding.encode_ordinary(text), pair, bad) for pair, (_, *texts) in enumerate(pairs)
                        for bad, text in enumerate(texts)), key=lambda sentence: len(sentence[0]))
    scores, active_sum, count, done = np.zeros((len(pairs), 2)), 0.0, 0, 0
    while done < len(sentences):
        progress(f'BLiMP: {done} of {len(sentences)} sentences read')
        length = len(sentences[done][0])
        batch = sentences[done:done + min(rows_at_once(model, length), 256)]
        batch = [sentence for sentence in batch if len(sentence[0]) == length]
        tokens = torch.tensor([start + ids for ids, _, _ in batch], device=device)
        logits, active = model(tokens[:, :-1], dense=dense)
        logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[:, :, 0].sum(1).cpu().numpy()
        scores[[pair for _, pair, _ in batch], [bad for _, _, bad in batch]] = logp
        active_sum, count = active_sum + float(active.sum()), count + tokens[:, 1:].numel()
        done += len(batch)
    progress()
    right = {}
    for (paradigm, *_), (good, bad) in zip(pairs, scores):
        right.setdefault(paradigm, []).append(float(good > bad))
    accuracy = {paradigm: float(np.mean(hits)) for paradigm, hits in right.items()}
    return accuracy, model.n_weights() * count / active_sum


@torch.no_grad()
def answer(teacher, prompt, stops, generator):
    """Ids of a prompt and of the answer, stop token included, that a dense model draws as chat.py would."""
    tokens, cache = list(prompt), KVCache(teacher.config, device=teacher.head.weight.device)
    for _ in range(LONGEST_ANSWER):
        new = torch.tensor([tokens[cache.length:]], device=teacher.head.weight.device)
        logits, _ = teacher(new, cache, dense=True)
        point = torch.rand(1, generator=generator).to(logits.device)
        said = torch.tensor([tokens[len(prompt):]], dtype=torch.long, device=logits.device)
        tokens.append(int(sample(logits[:, -1], point, said=said, **SAMPLING)[0]))
        if tokens[-1] in stops:
            break
    return tokens


@torch.no_grad()
def compare_answers(model, teacher, spec, encoding, questions):
    """
    What a chat is for: the dense teacher answers each question, and both models read its answers. -> a dict
    of kl, KL(teacher || student) in nats, agreement and reduction, all over the passes that predict tokens of
    answers, of how many questions and tokens that is, and of compute_percentiles, as in measure(), of the
    passes over those tokens. Raises DataError for a question that does not fit the context.
    """
    generator, device = torch.Generator().manual_seed(1), model.head.weight.device
    kl, same, active_sum, count, shares = 0.0, 0, 0.0, 0, []
    for number, question in enumerate(counted(questions, 'questions answered'), 1):
        prompt = dialogue_ids(spec, encoding, [('user', question)])
        if len(prompt) + LONGEST_ANSWER > model.config.block_size:
            raise DataError(f'question {number} has {len(prompt)} tokens, with an answer more than the '
                            f'{model.config.block_size} of the context; shorten it')
        tokens = torch.tensor([answer(teacher, prompt, stop_ids(spec, encoding), generator)], device=device)
        logits, active = model(tokens[:, :-1])
        logp = logits[0, len(prompt) - 1:].log_softmax(-1)                              # (T, vocab)
        teacher_logits, _ = teacher(tokens[:, :-1], dense=True)
        teacher_logp = teacher_logits[0, len(prompt) - 1:].log_softmax(-1)
        kl += float((teacher_logp.exp() * (teacher_logp - logp)).sum())
        same += int((teacher_logp.argmax(-1) == logp.argmax(-1)).sum())
        used = active.sum(0)[0, len(prompt) - 1:].cpu()                                 # (T,)
        active_sum, count = active_sum + float(used.sum()), count + len(logp)
        shares.append(used[1:].double() / model.n_weights())
    return dict(kl=kl / count, agreement=same / count, reduction=model.n_weights() * count / active_sum,
                questions=len(questions), tokens=count, compute_percentiles=percentiles(torch.cat(shares)))


def read_blimp(path, most):
    """[(paradigm, good, bad)], the first `most` of each paradigm. Raises DataError."""
    try:
        progress(f'reading {path}')
        if path.endswith('.xz'):
            with open_regular(path) as packed, lzma.open(packed) as file:
                data = file.read(LONGEST_JSON + 1)      # what is packed may unfold to anything
            if len(data) > LONGEST_JSON:
                raise ValueError(f'more than {LONGEST_JSON:,} bytes')
            text = decode_text(data, path)
        else:
            text = read_text(path, LONGEST_JSON)
        rows = [json.loads(line) for line in text.split('\n') if line.strip()]
        seen, pairs = {}, []
        for row in rows:
            seen[row['UID']] = seen.get(row['UID'], 0) + 1
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
    """The lines of a text file that are not empty. Raises DataError."""
    questions = [line.strip() for line in read_file(path).split('\n') if line.strip()]
    if not questions:
        raise DataError(f'{path}: no questions in it')
    return questions


def text_windows(path, spec, encoding, count, length):
    """np.int64 (windows, length + 1): `count` windows of a text file, evenly spread. Raises DataError."""
    progress(f'tokenizing {path}')
    ids = np.array(bos_ids(spec) + encoding.encode_ordinary(read_file(path)), np.int64)
    if len(ids) <= length:
        raise DataError(f'{path}: {len(ids)} tokens are fewer than one window of {length}')
    starts = np.unique(np.linspace(0, len(ids) - length - 1, count).astype(np.int64) // length * length)
    return np.stack([ids[start:start + length + 1] for start in starts])


def validation_windows(data, meta, count, length):
    """
    The same of a data set's validation split: always the same windows. In data that is made of independent
    windows no token follows the last one of a window, so where length is all of it, T is one less.
    """
    stride = meta.get('window', 1)
    length = min(length, meta.get('window', length + 1) - 1)
    starts = stride * np.linspace(0, (len(data) - length - 1) // stride, count).astype(np.int64)
    return np.stack([data[start:start + length + 1] for start in starts]).astype(np.int64)


def mix_windows(mix, split, count, length):
    """
    validation_windows() of each data set of a mix, as many as its share: np.int64 (count, T + 1). split:
    'train' or 'val'. T is that of the data set whose windows are the shortest.
    """
    counts = np.diff(np.rint(count * np.cumsum([0] + [part.share for part in mix])).astype(int))
    found = [validation_windows(getattr(part, split), part.meta, n, length)
             for part, n in zip(mix, counts) if n]
    shortest = min(windows.shape[1] for windows in found)
    return np.concatenate([windows[:, :shortest] for windows in found])


def windows_of_kind(kind, data, meta, spec, encoding, count, length):
    """
    As validation_windows(), of a chat model's text only 'dialogues', which begin with its template, or only
    'documents', which do not. Raises DataError where there are none.
    """
    begin = dialogue_ids(spec, encoding, [('user', '')])[0] if 'template' in spec else -1
    windows = validation_windows(data, meta, len(data) // meta.get('window', length), length)
    windows = windows[(windows[:, 0] == begin) == (kind == 'dialogues')]
    if not len(windows):
        raise DataError(f'no validation windows that are {kind}; read all of them')
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]


# what is read in place of a data set's validation text, and the options that then have no use
NO_USE = {'questions': {'blimp', 'text', 'data', 'only', 'windows', 'dense'},
          'blimp': {'text', 'data', 'only', 'windows'},
          'text': {'data', 'only'}}


def main():
    config, given = parse_options(EvaluateConfig, 'python evaluate.py')
    kind = next((name for name in NO_USE if getattr(config, name)), '')
    for name in sorted(given & NO_USE.get(kind, set())):
        fail(f'--{name} has no use beside --{kind}: leave one of them out')
    if 'blimp_pairs' in given and not config.blimp:
        fail('--blimp_pairs has no use without --blimp FILE')
    if len(config.checkpoint) > 1:
        fail('give one checkpoint')
    if config.only not in ('', 'dialogues', 'documents'):
        fail(f'--only {config.only}: choose dialogues or documents')
    path = config.checkpoint[0] if config.checkpoint else 'out/best.safetensors'
    device, start = choose_device(config.device), time.time()
    try:
        model, saved = weights.load(path)
        spec = saved['tokenizer']
        encoding = load_tokenizer(spec)
        options = saved.get('options', {})
        length = min(options.get('block_size', 512), model.config.block_size)
        model.to(device)
        compared = saved.get('base') and not config.blimp
        teacher = weights.load(saved['base'])[0].to(device) if compared else None
        if config.questions and (teacher is None or 'template' not in spec):
            fail(f'--questions: {path} is no adapter of a chat model; give one, such as '
                 'adapters/smollm2.safetensors')
        if config.questions:
            results = compare_answers(model, teacher, spec, encoding, read_questions(config.questions))
        elif config.blimp:
            pairs = read_blimp(config.blimp, config.blimp_pairs)
            by_paradigm, reduction = blimp(model, encoding, start_ids(spec, encoding), pairs, config.dense)
            results = dict(blimp=float(np.mean(list(by_paradigm.values()))), reduction=reduction,
                           pairs=len(pairs), by_paradigm=by_paradigm)
        else:
            if config.text:
                tokens = text_windows(config.text, spec, encoding, config.windows, length)
            elif config.only:
                _, data, meta = load_dataset(config.data or options.get('data', 'python'), length)
                tokens = windows_of_kind(config.only, data, meta, spec, encoding, config.windows, length)
            else:
                mix = load_mix(config.data or options.get('data', 'python'), length)
                tokens = mix_windows(mix, 'val', config.windows, length)
            results = dict(measure(model, tokens, teacher, config.dense, in_replies(tokens, spec)),
                           windows=len(tokens), length=tokens.shape[1] - 1)
    except (CheckpointError, weights.WeightsError, TokenizerError) as error:
        fail(error, 1)
    if config.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        if isinstance(value, (int, float)):
            print(f'{name:22}{value:.4f}' if isinstance(value, float) else f'{name:22}{value}')
    print(f'{time.time() - start:.0f} s on {device}', file=sys.stderr)


if __name__ == '__main__':
    run(main)
