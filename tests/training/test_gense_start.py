"""GenSE's start for small data sets: heads look at the moment and the chain that they should."""

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.generators.gense import NEW_POSITION, GenSE
from mediatok.training.gense_start import ACOUSTIC, CLEAN_SEMANTIC, N2S_LOOKS, S2S_LOOKS, WRITTEN, align_chains
from mediatok.training.gense_training import KeptTokens

TOKENS = 24


@pytest.fixture(scope="module")
def codes():
    torch.manual_seed(1)
    return torch.randn(20, 12), torch.randn(50, 6)


@pytest.fixture(scope="module")
def aligned(codes):
    torch.manual_seed(0)
    model = GenSE(
        num_semantic=20, num_acoustic=50, hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
        n2s_positions=TOKENS + 1, s2s_positions=NEW_POSITION + TOKENS, dropout=0.0,
    )  # fmt: skip
    align_chains(model, TOKENS, *codes)
    return model


def most_attended(gpt, ids_L, positions_L, head):
    """Which place each place attends to most, in the first block: int64 [L]."""
    block, width = gpt.blocks[0], gpt.wte.weight.shape[1]
    x_LW = block.ln_1(gpt.wte(ids_L) + gpt.wpe(positions_L))
    q_LW, k_LW, _ = block.attn.qkv(x_LW).chunk(3, dim=-1)
    own = slice(head * width // gpt.num_heads, (head + 1) * width // gpt.num_heads)
    scores_LL = q_LW[:, own] @ k_LW[:, own].T
    return scores_LL.masked_fill(torch.ones_like(scores_LL).triu(1).bool(), -torch.inf).argmax(dim=1)


@torch.no_grad()
def test_s2s_looks_at_its_moment_in_each_chain(aligned):
    rng = torch.Generator().manual_seed(2)
    noisy, clean = torch.randint(20, (2, 1, TOKENS), generator=rng)
    voice, written = torch.randint(50, (2, 1, TOKENS), generator=rng)
    prompt, positions = aligned.s2s_prompt(noisy, clean, voice)
    ids = torch.cat([prompt[0], written[0] + aligned.acoustic_ids.start])
    positions = torch.cat([positions, NEW_POSITION + torch.arange(TOKENS)])
    # Noisy semantic, clean semantic, <begin>, noisy acoustic, written; token j is read at moment j + 1, to write j + 1.
    time = torch.arange(TOKENS)
    moment = torch.cat([time, time, torch.tensor([-99]), time, time + 1])
    chain = torch.tensor([9] * TOKENS + [CLEAN_SEMANTIC] * TOKENS + [9] + [ACOUSTIC] * TOKENS + [WRITTEN] * TOKENS)
    newest = torch.arange(2, TOKENS - 2)
    for head, (ahead, mark) in enumerate(S2S_LOOKS):
        seen = most_attended(aligned.s2s, ids, positions, head)[len(prompt[0]) + newest]
        assert (moment[seen] - (newest + 1 + ahead)).abs().float().mean() < 1, (head, moment[seen])
        if mark == ACOUSTIC:  # noisy, or written
            assert ((chain[seen] == ACOUSTIC) | (chain[seen] == WRITTEN)).float().mean() > 0.9, (head, chain[seen])
        elif mark is not None:
            assert (chain[seen] == mark).float().mean() > 0.9, (head, chain[seen])


@torch.no_grad()
def test_n2s_looks_ahead_in_the_noisy_tokens(aligned):
    rng = torch.Generator().manual_seed(3)
    noisy, clean = torch.randint(20, (2, 1, TOKENS), generator=rng)
    prompt, positions = aligned.n2s_prompt(noisy)
    ids = torch.cat([prompt[0], clean[0] + aligned.semantic_ids.start])
    positions = torch.cat([positions, torch.arange(TOKENS)])
    head = N2S_LOOKS.index((1, None))
    newest = torch.arange(TOKENS - 1)
    seen = most_attended(aligned.n2s, ids, positions, head)[TOKENS + 1 + newest]
    assert (seen == newest + 1).float().mean() > 0.9, seen


def test_alike_codes_begin_as_alike_tokens(aligned, codes):
    rows = aligned.s2s.wte.weight[aligned.acoustic_ids]
    wanted, found = (torch.pdist(vectors) for vectors in (codes[1], rows.detach()))
    torch.testing.assert_close(found / found.mean(), wanted / wanted.mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 2}, {"hidden_size": 16}])
def test_heads_that_are_too_few_or_narrow_are_refused(codes, sizes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4} | sizes
    with pytest.raises(mt.MediatokError, match="aligned_start needs 4 heads of 8"):
        align_chains(GenSE(num_semantic=20, num_acoustic=50, **sizes), 4, *codes)


def test_tokens_are_made_once_and_come_in_every_order():
    made = []

    def tokens(clean_BT, noisy_BT):
        made.extend(clean_BT[:, 0].tolist())
        return clean_BT, clean_BT + 1, noisy_BT, noisy_BT + 1

    data = [(torch.full((3,), float(i)), torch.full((3,), 100.0 + i)) for i in range(7)]
    kept = KeptTokens(7, data, tokens, seed=5)
    batches = kept.batches(0, 4, 0, 1)
    first = [next(batches) for _ in range(14)]  # eight times each
    rows = torch.cat([batch[0][:, 0] for batch in first])
    assert sorted(made) == list(range(7))
    assert np.bincount(rows.int()).tolist() == [8] * 7
    assert rows[:7].tolist() != rows[7:14].tolist()
    for batch in first:
        assert torch.equal(batch[2], batch[0] + 100)
        assert torch.equal(batch[3], batch[0] + 101)
    # From a place in the middle, on another process, the same samples.
    again = KeptTokens(7, data, tokens, seed=5).batches(5, 2, 1, 2)
    assert torch.equal(next(again)[0], first[5][0][2:])
