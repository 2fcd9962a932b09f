"""
Text that a chat model writes itself -> train.bin, val.bin, meta.json: what its sparse copy learns from.

    python data/selfwritten/prepare.py --model smollm2      # 16M tokens: 150 seconds on an H200
    python data/selfwritten/prepare.py --tokens 50000       # on two CPU cores: minutes, at some 100 tokens/s

Half of the windows are dialogues: given is only the template up to where the user speaks, and the model
writes the question, then the answer, then the next question, to the end of the window. The other half are
plain documents, begun from a random token; where one ends, the next begins. No corpus and no licence but the
model's own. Users and documents are drawn at temperature 1, answers at 0.7. In half of the windows min-p 0.05
leaves only what is likely; in the others, --anything, users and documents are drawn from all that the model
thinks possible: people write what surprises it, and a copy that has read only what is likely is at a loss
there.
Half of the documents begin as if after another document's end.

The text depends on the seed, the options and the device alone. A run that stops is taken up where it was by
the same command: finished windows wait in train.bin.part and val.bin.part, progress.json counts them.

Not here: filtering. At these temperatures next to no window comes twice.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
import weights
from checkpoint import CheckpointError
from cwic import KVCache, sample
from data.common import DataError, load_progress, make_meta, publish, run, save_progress, token_dtype
from device import choose_device
from options import option, parse_options
from tokenizer import dialogue_ids, end_id, load_tokenizer, stop_ids

VAL_EVERY = 64              # one window in so many is for validation
MIN_P = 0.05


@dataclass
class SelfWrittenConfig:
    """Text that a chat model writes itself: half dialogues, half plain documents."""
    model: str = option('smollm2', 'the chat model: smollm2, a Llama-family folder or GGUF file, ...')
    tokens: int = option(16_000_000, 'how many to write, at least', at_least=1)
    dialogues: float = option(0.5, 'share of dialogues; the rest are documents', at_least=0, at_most=1)
    anything: float = option(0.5, 'share of windows in which users and documents are drawn from all tokens, '
                             'not only from likely ones', at_least=0, at_most=1)
    window: int = option(512, 'length of the independent windows, in tokens', at_least=32)
    batch: int = option(0, 'windows written at once; 0: 4096 on a GPU, 16 on a CPU', at_least=0)
    user_temperature: float = option(1.0, 'of questions and documents', at_least=0.01)
    answer_temperature: float = option(0.7, 'of answers', at_least=0.01)
    seed: int = option(1, 'of the random numbers', at_least=0)
    device: str = option('auto', 'auto, cpu, cuda or mps')
    out: str = option(str(HERE), 'folder for train.bin, val.bin and meta.json')


def template_pieces(spec, encoding):
    """
    What the chat template puts around the words, as lists of ids: before the first user's, between user and
    assistant, and between assistant and user. Found by comparing dialogues that differ in one word.
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


@torch.inference_mode()
def write_windows(model, spec, encoding, count, config, device, generator):
    """
    Windows of text np.int64 (count, config.window), first the dialogues, then the documents. All advance
    together, one token at a time, through one KV cache.
    """
    opening, to_answer, to_question = template_pieces(spec, encoding)
    stops = torch.tensor(sorted(stop_ids(spec, encoding)), device=device)
    end, special = end_id(spec, encoding), sorted(encoding.special.values())
    plain = torch.tensor([i for i in range(encoding.n_vocab) if i not in set(special)], device=device)
    dialogue = torch.arange(count, device=device) < round(count * config.dialogues)
    # forced[0] follows the stop token of a question, forced[1] that of an answer
    lengths = torch.tensor([len(to_answer) - 1, len(to_question) - 1], device=device)
    longest = int(lengths.max())
    padded = [(ids[1:] + [0] * longest)[:longest] for ids in (to_answer, to_question)]
    forced = torch.tensor(padded, device=device)                    # (2, longest)
    # a dialogue's turns end with the stop token, and with nothing else; a document may end where it likes
    forbidden = torch.zeros(2, model.config.vocab_size, device=device)
    forbidden[:, special] = -torch.inf
    forbidden[0, end], forbidden[1, to_answer[0]] = 0, 0

    speaker = torch.zeros(count, dtype=torch.long, device=device)   # 0: user, 1: assistant
    said = torch.full((count,), longest, device=device)         # of the forced tokens; all: the model speaks
    window = torch.zeros(count, config.window, dtype=torch.long, device=device)
    window[dialogue, :len(opening)] = torch.tensor(opening, device=device)

    def toss(share):
        return (torch.rand(count, generator=generator) < share).to(device)

    def random_token():
        return plain[torch.randint(len(plain), (count,), generator=generator).to(device)]

    window[~dialogue, 0] = random_token()[~dialogue]
    window[~dialogue & toss(0.5), 0] = end
    anything = toss(config.anything)
    cache = KVCache(replace(model.config, block_size=config.window), count, device, model.head.weight.dtype)
    for i in range(config.window - 1):
        logits, _ = model(window[:, i:i + 1], cache, dense=True)    # (count, 1, vocab)
        answers = dialogue & (speaker == 1)
        temperature = torch.where(answers, config.answer_temperature, config.user_temperature)
        point = torch.rand(count, generator=generator).to(device)
        logits = logits[:, 0] + forbidden[dialogue.long()]
        min_p = torch.where(anything & ~answers, 0.0, MIN_P)
        drawn, _ = sample(logits, point, temperature[:, None], min_p=min_p[:, None])
        # what the template says comes before what the model says; then the other one speaks
        must, given = dialogue & (said < lengths[speaker]), dialogue & (i + 1 < len(opening))
        token = torch.where(must, forced[speaker, said.clamp_max(longest - 1)], drawn)
        token = torch.where(~dialogue & (window[:, i] == end), random_token(), token)
        said = torch.where(must, said + 1, said)
        done = must & (said == lengths[speaker])
        speaker, said = torch.where(done, 1 - speaker, speaker), torch.where(done, longest, said)
        said = torch.where(dialogue & ~must & ~given & torch.isin(token, stops), 0, said)
        window[:, i + 1] = torch.where(given, window[:, i + 1], token)
    return window.cpu().numpy()


def main():
    config, _ = parse_options(SelfWrittenConfig, 'python data/selfwritten/prepare.py')
    device = choose_device(config.device)
    batch = config.batch or (4096 if device == 'cuda' else 16)
    if batch == 1:
        raise DataError('--batch must be at least 2: a dialogue and a document')
    folder = Path(config.out)
    settings = {'model': config.model, 'window': config.window, 'batch': batch, 'seed': config.seed,
                'temperatures': [config.user_temperature, config.answer_temperature],
                'dialogues': config.dialogues, 'anything': config.anything}
    progress = load_progress(folder, {'settings': settings, 'batches': 0})
    try:
        model, saved = weights.load(config.model)
    except (CheckpointError, weights.WeightsError) as error:
        raise DataError(str(error)) from None
    spec = saved['tokenizer']
    encoding = load_tokenizer(spec)
    if 'template' not in spec:
        raise DataError(f'{config.model} has no chat template: it cannot write dialogues')
    model = model.to(device, torch.bfloat16 if device == 'cuda' else torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    batches = -(-config.tokens // (batch * config.window))
    dtype = token_dtype(encoding.n_vocab)
    every = min(VAL_EVERY, batch // 2)      # of dialogues as of documents; half and half, at least one each
    val_rows = np.arange(batch) % every == every - 1
    split_rows = {'train': ~val_rows, 'val': val_rows}
    parts = {split: folder / f'{split}.bin.part' for split in split_rows}
    for i in range(progress['batches'], batches):
        start, generator = time.perf_counter(), torch.Generator().manual_seed(config.seed * 1_000_003 + i)
        text = write_windows(model, spec, encoding, batch, config, device, generator).astype(dtype)
        for split, path in parts.items():
            rows = split_rows[split]
            with open(path, 'ab') as f:     # less what a kill left after the last record
                f.truncate(i * int(rows.sum()) * config.window * dtype().itemsize)
                f.write(np.ascontiguousarray(text[rows]))
                f.flush()
                os.fsync(f.fileno())
        progress['batches'] = i + 1
        save_progress(folder, progress)
        speed = batch * config.window / (time.perf_counter() - start)
        print(f'{(i + 1) * batch * config.window:,} tokens written, {speed:,.0f}/s', flush=True)
    tokens = {split: batches * int(rows.sum()) * config.window for split, rows in split_rows.items()}
    size = {split: len(encoding.decode_bytes(np.fromfile(path, dtype).tolist()))
            for split, path in parts.items()}
    meta = {**make_meta(encoding, spec, f'written by {config.model}', tokens, size), 'window': config.window}
    publish(folder, meta)
    (folder / 'progress.json').unlink()


if __name__ == '__main__':
    run(main)
