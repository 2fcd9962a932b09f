"""
Draws the next token from logits: temperature, top-k, top-p, min-p and a repeat penalty, many rows at once.

    ids, probability = sample(logits, torch.rand(len(logits)), temperature=0.7, top_p=0.9)

chat.py, evaluate.py and data/selfwritten/prepare.py sample with it. The random number is an argument, so that
two models can be given the same one and compared token by token.

Not here: beam search, penalties for frequency, grammars.
"""

import torch

REPEAT_WINDOW = 64      # tokens


def likeliest(q, top_k, top_p):
    """
    The tokens that top_k and top_p keep. q (B, vocab): probabilities -> theirs in falling order, then 0; and
    their ids. Both are (B, n). Of equally likely tokens the lower id comes first.
    """
    n = top_k
    if not top_k:
        # all tokens below the floor hold less than 1 - top_p together, so none of them is kept and needs
        # sorting: to sort a whole vocabulary takes longer than the model
        floor = (1 - top_p) / q.shape[-1]
        n = int((q >= floor).sum(-1).max())
    ids = q.topk(min(max(n, 1), q.shape[-1])).indices.sort().values                 # (B, n)
    kept, order = q.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    total = (kept if top_k else q).sum(-1, keepdim=True)
    return torch.where(kept.cumsum(-1) - kept < top_p * total, kept, 0.0), ids.gather(-1, order)


def sample(logits, point, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, said=None):
    """
    Draws a token for each row. logits (B, vocab) -> ids (B,), and their probability (B,) under the model, as
    it was before everything below.

    point (B,): uniform random numbers from 0 to 1, one for each row even if it is greedy. temperature: 0 for
    greedy; or (B, 1), all above 0. Kept are the top_k likeliest tokens (0: all), of these the fewest that
    hold top_p of the probability, and of these all with at least min_p, a number or (B, 1), times the
    probability of the likeliest. said (B, n): ids of the text so far. The last REPEAT_WINDOW become less
    likely: their logits are divided by repeat_penalty if positive, else multiplied.
    """
    logits = logits.float()
    p = logits.softmax(-1)                                                          # (B, vocab)
    if repeat_penalty != 1:
        said = said[:, -REPEAT_WINDOW:]
        old = logits.gather(-1, said)                                               # (B, n)
        logits = logits.scatter(-1, said, torch.where(old > 0, old / repeat_penalty, old * repeat_penalty))
    if isinstance(temperature, (int, float)) and temperature == 0:
        ids = logits.argmax(-1)
    else:
        q, order = (logits / temperature).softmax(-1), None
        if top_k or top_p < 1:
            q, order = likeliest(q, top_k, top_p)                                   # (B, n)
        q = torch.where(q >= min_p * q.amax(-1, keepdim=True), q, 0.0)
        mass = q.cumsum(-1)
        ids = torch.searchsorted(mass, point[:, None] * mass[:, -1:], right=True)[:, 0]
        # a top_p of 0 keeps no token, and rounding may lead past the last one that was kept
        ids = ids.clamp_max(q.shape[-1] - 1)
        ids = torch.where(q.gather(-1, ids[:, None])[:, 0] > 0, ids, q.argmax(-1))
        ids = ids if order is None else order.gather(-1, ids[:, None])[:, 0]
    return ids, p.gather(-1, ids[:, None])[:, 0]
