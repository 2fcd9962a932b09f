"""
Text that a chat model writes itself, for its sparse copy to learn from -> train.bin, val.bin, meta.json.

    python data/selfwritten/prepare.py --model smollm2      # 16M tokens: 150 seconds on an H200
    python data/selfwritten/prepare.py --tokens 50000       # on two CPU cores: minutes, about 100 tokens/s
    python data/selfwritten/prepare.py --questions FILE     # dialogues that begin with people's questions

The text comes in windows, all of one length. Half of them are dialogues: the model gets the chat template up
to where the user speaks, and writes the question, then the answer, then the next question, to the end of the
window. The other half are plain documents, each begun from a random token; if one ends, the next begins.
There is no corpus, and no licence but the model's own.

Users and documents are sampled at temperature 1, answers at 0.7. In half of the windows, min-p 0.05 leaves
only likely tokens. In the others users and documents are sampled from all tokens: people write things that
surprise the model, and a copy that has only read likely text is lost there. Half of the document windows
begin as if another document had just ended.

People also ask what the model would not. With --questions, a share of the dialogues (--asked) begin with a
line of that file as the user's first message; the model answers, and goes on as in the others.

The text depends only on the seed, the options, the questions and the device. On Ctrl-C, the data set is made
of what has been written.

Not here: filtering, as at these temperatures hardly any window comes twice; going on with such a part.
"""

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # for torch's threads, as in train.py

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
import weights
from checkpoint import CheckpointError
from cwic import KVCache
from data.common import DataError, run, token_dtype, until_stopped, write_dataset
from device import choose_device
from evaluate import read_questions
from options import counted, option, parse_options
from sampling import sample
from tokenizer import bos_ids, dialogue_ids, end_id, load_tokenizer, stop_ids

VAL_EVERY = 64              # one window in 64 is for validation
USER_TEMPERATURE, ANSWER_TEMPERATURE = 1.0, 0.7         # users write questions and documents
MIN_P = 0.05
# What a place in a script asks for, if not for one certain token, whose id it then is: words of one of three
# speakers, up to a stop token; or any token at random
USER, ASSISTANT, DOCUMENT, RANDOM = -1, -2, -3, -4


@dataclass
class SelfWrittenConfig:
    about = 'Text that a chat model writes itself: half dialogues, half plain documents.'
    model: str = option('smollm2', 'the chat model: smollm2, a Llama-family folder or GGUF file, ...')
    tokens: int = option(16_000_000, 'how many tokens to write, at least', at_least=1)
    dialogues: float = option(0.5, 'share of dialogues; the rest are documents', at_least=0, at_most=1)
    questions: str = option('', "a file of people's questions, one on each line, \\n for a line break")
    asked: float = option(0.6, 'with --questions: share of dialogues that begin with one of them', at_least=0,
                          at_most=1)
    window: int = option(512, 'length of the independent windows, in tokens', at_least=32)
    batch: int = option(0, 'windows written at once; 0: 4096 on a GPU, up to 16 on a CPU', at_least=0)
    seed: int = option(1, 'of the random numbers', at_least=0)
    device: str = option('auto', 'auto, cpu, cuda or mps')
    out: str = option(str(HERE), 'folder for train.bin, val.bin and meta.json')


def template_pieces(spec, encoding):
    """
    The fixed parts of the chat template, as lists of ids: before the first user's words, from the user's to
    the assistant's, and from those to the next user's. Found by comparing dialogues that differ in one word.
    """
    def around_last_word(before):
        a, b = (dialogue_ids(spec, encoding, before + [('user', word)]) for word in ('a', 'b'))
        differs = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
        return a[:differs], a[differs + 1:]

    opening, to_answer = around_last_word([])
    dialogue, _ = around_last_word([('user', 'a'), ('assistant', 'a')])
    to_question = dialogue[len(opening) + 1 + len(to_answer) + 1:]
    if not {to_answer[0], to_question[0]} <= stop_ids(spec, encoding):
        raise DataError('turns do not end with a stop token in this chat template: no dialogues')
    return opening, to_answer, to_question


def scripts(to_answer, to_question, bos):
    """
    What stands at each place of a dialogue, then of documents, and the place after each, as two lists. Both
    go round: after the last place comes the first one again. Speakers say the stop token themselves.
    """
    dialogue = [USER, *to_answer[1:], ASSISTANT, *to_question[1:]]
    documents = [DOCUMENT, *bos, RANDOM]
    script, middle = dialogue + documents, len(dialogue)
    return script, [*range(1, middle), 0, *range(middle + 1, len(script)), middle]


def in_template(questions, spec, encoding, window):
    """
    -> for each question, the ids of the template with it, up to where the answer begins. No special token can
    come from a question. Raises DataError for one that leaves no room in a window (tokens).
    """
    prompts = [dialogue_ids(spec, encoding, [('user', text.replace('\\n', '\n'))]) for text in questions]
    for text, ids in zip(questions, prompts):
        if len(ids) >= window:
            raise DataError(f'--questions: {text[:40]!r}... has {len(ids)} tokens in the template, no room '
                            f'for an answer in a --window of {window}; shorten it')
    return prompts


@torch.inference_mode()
def write_windows(model, spec, encoding, count, config, device, generator, prompts=()):
    """
    Windows of text, np.int64 (count, config.window), first the dialogues, then the documents. All advance
    together, one token at a time, through one KV cache. prompts: lists of ids; a share config.asked of the
    dialogues, the first ones, each begin with one of them, chosen at random.
    """
    opening, to_answer, to_question = template_pieces(spec, encoding)
    bos, end, special = bos_ids(spec), end_id(spec, encoding), sorted(encoding.special.values())
    script, following = torch.tensor(scripts(to_answer, to_question, bos), device=device)
    stops = torch.tensor(sorted(stop_ids(spec, encoding)), device=device)
    plain = torch.tensor([i for i in range(encoding.n_vocab) if i not in set(special)], device=device)
    dialogues = round(count * config.dialogues)
    dialogue = torch.arange(count, device=device) < dialogues
    # a dialogue's turns end with the stop token, a document with the end token; no other special token is
    # sampled. (documents or dialogues, vocab)
    forbidden = torch.zeros(2, model.config.vocab_size, device=device)
    forbidden[:, special] = -torch.inf
    forbidden[0, end], forbidden[1, to_answer[0]] = 0, 0

    def toss(share):
        return (torch.rand(count, generator=generator) < share).to(device)

    def random_token():
        return plain[torch.randint(len(plain), (count,), generator=generator).to(device)]

    # what each window begins with, how long that is, and the place after it
    asked = round(dialogues * config.asked) if prompts else 0
    drawn = torch.randint(len(prompts), (asked,), generator=generator).tolist() if asked else []
    openings = [prompts[i] for i in drawn] + [opening] * (dialogues - asked)
    window = torch.zeros(count, config.window, dtype=torch.long)
    for row, ids in enumerate(openings):
        window[row, :len(ids)] = torch.tensor(ids)
    window = window.to(device)
    lengths = [len(ids) for ids in openings] + [len(bos) + 1] * (count - dialogues)
    given = torch.tensor(lengths, device=device)                    # (count,)
    places = [ASSISTANT] * asked + [USER] * (dialogues - asked) + [DOCUMENT] * (count - dialogues)
    place = torch.tensor([script.tolist().index(speaker) for speaker in places], device=device)
    # a document begins with BOS, if there is one, and a random token; or after another's end, with BOS
    begin = torch.tensor([*bos, 0], device=device).repeat(count, 1)
    begin[:, -1] = random_token()
    after_another = ~dialogue & toss(0.5)
    begin[after_another] = torch.tensor([end, *bos], device=device)
    window[~dialogue, :len(bos) + 1] = begin[~dialogue]
    place[after_another] = len(script) - 1                          # RANDOM
    anything = toss(0.5)

    cache = KVCache(replace(model.config, block_size=config.window), count, device, model.head.weight.dtype)
    for i in counted(range(config.window - 1), f'writing {count:,} windows, tokens of each'):
        logits, _ = model(window[:, i:i + 1], cache, dense=True)    # (count, 1, vocab)
        due = script[place]                                         # (count,)
        answers = due == ASSISTANT
        temperature = torch.where(answers, ANSWER_TEMPERATURE, USER_TEMPERATURE)
        min_p = torch.where(anything & ~answers, 0.0, MIN_P)
        point = torch.rand(count, generator=generator).to(device)
        sampled, _ = sample(logits[:, 0] + forbidden[dialogue.long()], point, temperature[:, None],
                            min_p=min_p[:, None])
        token = torch.where(due >= 0, due, torch.where(due == RANDOM, random_token(), sampled))
        opens = i + 1 < given
        token = torch.where(opens, window[:, i + 1], token)
        speaks = (due < 0) & (due != RANDOM) & ~torch.isin(token, stops)
        place = torch.where(opens | speaks, place, following[place])
        window[:, i + 1] = token
    return window.cpu().numpy()


def main():
    config, given = parse_options(SelfWrittenConfig, 'python data/selfwritten/prepare.py')
    if 'asked' in given and not config.questions:
        raise DataError('--asked has no use without --questions FILE')
    device = choose_device(config.device)
    rows = max(2, math.ceil(config.tokens / config.window))
    batch = config.batch or (4096 if device == 'cuda' else min(16, rows))
    if batch == 1:
        raise DataError('--batch must be at least 2: a dialogue and a document')
    questions = read_questions(config.questions) if config.questions else []
    try:
        model, saved = weights.load(config.model)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    spec = saved['tokenizer']
    encoding = load_tokenizer(spec)
    if 'template' not in spec:
        raise DataError(f'{config.model} has no chat template: it cannot write dialogues')
    prompts = in_template(questions, spec, encoding, config.window)
    model = model.to(device, torch.bfloat16 if device == 'cuda' else torch.float32)
    every = min(VAL_EVERY, batch // 2)      # at least one dialogue and one document
    val_rows = np.arange(batch) % every == every - 1

    def pieces():
        for i in range(math.ceil(config.tokens / (batch * config.window))):
            start, generator = time.perf_counter(), torch.Generator().manual_seed(config.seed * 1_000_003 + i)
            text = write_windows(model, spec, encoding, batch, config, device, generator, prompts)
            for split, rows in (('train', ~val_rows), ('val', val_rows)):
                ids = text[rows].ravel().astype(token_dtype(encoding.n_vocab))
                yield split, ids, len(encoding.decode_bytes(ids.tolist()))
            speed = batch * config.window / (time.perf_counter() - start)
            print(f'{(i + 1) * batch * config.window:,} tokens written, {speed:,.0f}/s', flush=True)

    source = f'written by {config.model}'
    write_dataset(config.out, encoding, spec, until_stopped(pieces()), source, window=config.window)


if __name__ == '__main__':
    run(main)
