"""
Standard benchmarks: accuracy, and the compute it took. BLiMP runs by itself, all others through EleutherAI's
lm-evaluation-harness.

    python lab/benchmarks.py --model adapters/smollm2.safetensors --blimp FILE
    pip install lm-eval==0.4.13         # the tested version; nothing else here needs it
    python lab/benchmarks.py --model adapters/smollm2.safetensors --tasks arc_easy,hellaswag,piqa
    python lab/benchmarks.py --model adapters/smollm2.safetensors --tasks arc_easy,hellaswag,piqa --dense

BLiMP (Warstadt et al., 2020, github.com/alexwarstadt/blimp) tests grammar with pairs of sentences: a pair is
right if the model finds the good sentence likelier than the bad one, as half of all guesses would be. FILE is
made of the files in its data/ folder: cat data/*.jsonl. Each line is a JSON object with 'sentence_good',
'sentence_bad' and 'UID', one of 67 paradigms.

The harness fetches its tasks from the network. With --include_path FOLDER it looks up --tasks only among your
own task files, YAML in the harness's format, and needs no network.

Everything is computed in f32, and the tokens of a question are as sparse as those of an answer. The reduction
is dense / active weights over all tokens that are read.

Not here: tasks that judge generated text (generate_until), chat templates, several GPUs.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the repository, for the imports below

import weights
from checkpoint import CheckpointError
from data.common import DataError, run
from device import choose_device
from evaluate import read_file, rows_at_once
from files import DAMAGED, one_line
from options import fail, option, parse_options, progress
from tokenizer import load_tokenizer, start_ids

LM_EVAL = 'lm-eval==0.4.13'
FEWSHOT_SEED = 1234     # the harness's default
BOOTSTRAPS = 1000       # resamples for the standard error of metrics that are not means, such as perplexity


@dataclass
class BenchmarkConfig:
    about = 'Accuracy and reduction on BLiMP, or on tasks of lm-evaluation-harness.'
    model: str = option('', 'what weights.load takes: a checkpoint, an adapter, a name')
    blimp: str = option('', 'BLiMP as JSON lines')
    tasks: str = option('', 'names of tasks or groups, or paths of YAML files, separated by commas')
    include_path: str = option('', "a folder with task files of your own, used instead of the harness's")
    limit: int = option(0, 'how many items of each task, or pairs of each paradigm, from the first on; '
                        '0: all', at_least=0)
    dense: bool = option(False, 'use every weight')
    json: bool = option(False, 'print one JSON object')
    device: str = option('auto', 'auto, cpu, cuda or mps')


# -----------------------------------------------------------------------------
# log p of a continuation, with or without the harness


def encode_pair(spec, encoding, context, continuation):
    """
    Two texts -> (ids of the context, ids of the continuation), split as the harness does: both are encoded as
    one text, and the context gets as many ids as it has alone, without the blanks at its end. Before it come
    the ids after which every text begins: without them, SmolLM2 gets half a point less of ARC-Easy, and a
    point less of PIQA. Raises DataError if no id is left for the continuation.
    """
    before = encoding.encode_ordinary(context.rstrip())
    after = encoding.encode_ordinary(context + continuation)[len(before):]
    if not after:
        raise DataError(f'nothing to score: {continuation!r:.80} is empty, or one token with the end of '
                        f'{context[-80:]!r}; begin it with a blank')
    return start_ids(spec, encoding) + before, after


@torch.no_grad()
def score(model, pairs, dense=False):
    """
    pairs: [(ids of a context, ids of a continuation)], none empty -> four arrays (pairs,):
        log p(continuation | context), in nats
        whether greedy decoding writes the continuation
        active weights of all tokens that were read
        the number of these tokens
    A pair that is longer than the model's context loses its beginning. Raises DataError if a continuation
    alone is longer.
    """
    device, longest, asked = model.head.weight.device, model.config.block_size, {}
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > longest:
            raise DataError(f'a continuation has {len(continuation)} tokens, more than the {longest} of the '
                            "model's context; leave that task out")
        # pairs with the same input share one pass: " yes" and " no" after the same question
        asked.setdefault(tuple((context + continuation)[:-1][-longest:]), []).append(i)
    logp, greedy = np.zeros(len(pairs)), np.zeros(len(pairs), bool)
    active, read = np.zeros(len(pairs)), np.zeros(len(pairs), int)
    inputs, done = sorted(asked, key=len, reverse=True), 0  # longest first: memory runs out early
    while done < len(inputs):
        length = len(inputs[done])
        batch = inputs[done:done + rows_at_once(model, length)]
        batch = [ids for ids in batch if len(ids) == length]            # no padding
        logits, counts = model(torch.tensor(batch, device=device), dense=dense)
        for ids, row, count in zip(batch, logits, counts.sum((0, 2)).tolist()):     # row: (T, vocab)
            for i in asked[ids]:
                target = torch.tensor(pairs[i][1], device=device)
                found = row[-len(target):].log_softmax(-1)
                logp[i] = float(found.gather(-1, target[:, None]).sum())
                greedy[i] = bool((found.argmax(-1) == target).all())
                active[i], read[i] = count, length
        done += len(batch)
        progress(f'{done:,} of {len(inputs):,} inputs read')
    progress()
    return logp, greedy, active, read


# -----------------------------------------------------------------------------
# BLiMP


def read_blimp(path, limit):
    """
    {paradigm: [(good sentence, bad sentence)]}, the first `limit` pairs of each paradigm, or all if it is 0.
    Raises DataError.
    """
    pairs = {}
    try:
        for row in map(json.loads, filter(str.strip, read_file(path).split('\n'))):
            pairs.setdefault(row['UID'], []).append((row['sentence_good'], row['sentence_bad']))
    except DAMAGED as error:
        raise DataError(f'{path}: not BLiMP as JSON lines ({one_line(error)})') from None
    if not pairs:
        raise DataError(f'{path}: no pairs of sentences in it')
    return {paradigm: some[:limit or None] for paradigm, some in pairs.items()}


def blimp(model, spec, encoding, pairs, dense=False):
    """pairs: see read_blimp() -> {paradigm: share of its pairs that is right}, and the reduction"""
    start = start_ids(spec, encoding)
    sentences = [(start, encoding.encode_ordinary(text))
                 for some in pairs.values() for pair in some for text in pair]
    logp, _, active, read = score(model, sentences, dense)
    right, ends = logp[::2] > logp[1::2], np.cumsum([len(some) for some in pairs.values()])
    accuracy = {paradigm: float(found.mean()) for paradigm, found in zip(pairs, np.split(right, ends[:-1]))}
    return accuracy, float(model.n_weights() * read.sum() / active.sum())


# -----------------------------------------------------------------------------
# the harness


def harness_model(model, spec, encoding, dense=False):
    """A cwic.GPT as an lm_eval.api.model.LM. Its .cost is {task: (active weights, tokens read)}."""
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(LM):
        def __init__(self):
            super().__init__()
            self.cost = {}

        def scored(self, pairs, tasks):
            """pairs as in score(), the name of the task of each -> their log p and whether they are greedy"""
            logp, greedy, active, read = score(model, pairs, dense)
            tasks = np.array(tasks)
            for task in set(tasks):
                mine = tasks == task
                self.cost[task] = self.cost.get(task, 0) + np.array([active[mine].sum(), read[mine].sum()])
            return logp.tolist(), greedy.tolist()

        def loglikelihood(self, requests):
            """requests: with .args (context, continuation) -> [(log p, greedy)]"""
            pairs = [encode_pair(spec, encoding, *request.args) for request in requests]
            return list(zip(*self.scored(pairs, [request.task_name for request in requests])))

        def loglikelihood_rolling(self, requests):
            """requests: with .args (text,) -> [log p of the text], read in windows as long as the context"""
            first, length = start_ids(spec, encoding)[-1], model.config.block_size
            texts = [encoding.encode_ordinary(*request.args) for request in requests]
            windows = [list(map(make_disjoint_window, get_rolling_token_windows(ids, first, length, 1)))
                       for ids in texts]
            logp, _ = self.scored(sum(windows, []), [request.task_name for request, some
                                                     in zip(requests, windows) for _ in some])
            logp = iter(logp)
            return [sum(next(logp) for _ in some) for some in windows]

        def generate_until(self, requests):
            raise NotImplementedError       # load_tasks() lets no task through that needs it

    return HarnessModel()


def load_tasks(names, include_path):
    """
    names of tasks and groups, or paths of YAML files -> tasks, as lm_eval.evaluate takes them. Raises
    DataError.
    """
    from lm_eval.tasks import TaskManager
    try:
        # looking through the harness's own thousands of files takes seconds
        manager = TaskManager(include_path=include_path or None, include_defaults=not include_path)
        loaded = manager.load(names)
    except Exception as error:      # task files may hold code, and networks fail in a dozen ways
        raise DataError(f'--tasks {",".join(names)}: cannot be loaded ({one_line(error)}); they are fetched '
                        'from the network, or with --include_path FOLDER looked up there only') from None
    for name, task in loaded['tasks'].items():
        if task.OUTPUT_TYPE not in ('loglikelihood', 'loglikelihood_rolling', 'multiple_choice'):
            raise DataError(f'{name}: its type is {task.OUTPUT_TYPE}, which is not supported; choose tasks '
                            'scored by the log p of an answer or a text')
        # as the harness's own program does
        task.set_config('num_fewshot', task.get_config('num_fewshot') or 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def run_tasks(config, names, model, spec, encoding):
    """
    --tasks -> a dict, the harness's own results and the reduction for each task and for all; and its table.
    Ends the program if there is no harness. Raises DataError.
    """
    try:
        import lm_eval
        from lm_eval.utils import make_table
    except ImportError as error:
        fail(f'lm-evaluation-harness cannot be imported ({error}): pip install {LM_EVAL}', 1)
    tasks, lm = load_tasks(names, config.include_path), harness_model(model, spec, encoding, config.dense)
    with redirect_stdout(sys.stderr):       # the harness prints, too, which would spoil --json
        found = lm_eval.evaluate(lm, tasks, limit=config.limit or None, bootstrap_iters=BOOTSTRAPS,
                                 log_samples=False)
    reduction = {task: float(model.n_weights() * read / active)
                 for task, (active, read) in {**lm.cost, 'all': sum(lm.cost.values())}.items()}
    return dict(lm_eval=lm_eval.__version__, results=found['results'], reduction=reduction), make_table(found)


def main():
    config, _ = parse_options(BenchmarkConfig, 'python lab/benchmarks.py')
    names = [name.strip() for name in config.tasks.split(',') if name.strip()]
    if not config.model or bool(names) == bool(config.blimp):
        fail('say which --model, and either --blimp FILE or --tasks: --model smollm2 --tasks arc_easy,piqa')
    if config.include_path and not os.path.isdir(config.include_path):
        fail(f'--include_path {config.include_path}: no such folder')
    device = choose_device(config.device)
    pairs = read_blimp(config.blimp, config.limit) if config.blimp else {}
    try:
        model, saved = weights.load(config.model)
    except CheckpointError as error:
        fail(error, 1)
    model, spec, encoding = model.to(device), saved['tokenizer'], load_tokenizer(saved['tokenizer'])
    if config.blimp:
        by_paradigm, reduction = blimp(model, spec, encoding, pairs, config.dense)
        mean, count = float(np.mean(list(by_paradigm.values()))), sum(map(len, pairs.values()))
        results = dict(blimp=mean, reduction=reduction, pairs=count, by_paradigm=by_paradigm)
        text = f'BLiMP: {mean:.4f} of {count:,} pairs right, reduction {reduction:.2f}x'
    else:
        results, text = run_tasks(config, names, model, spec, encoding)
        text += ''.join(f'\nreduction, {task}: {value:.2f}x' for task, value in results['reduction'].items())
    print(json.dumps(dict(model=config.model, dense=config.dense, **results)) if config.json else text)


if __name__ == '__main__':
    run(main)
