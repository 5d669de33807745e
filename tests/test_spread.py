"""Two processes as Ray Train would start them, without Ray."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from builders import doc, save_decoder, stepped
from torch import nn
from torch.distributed.fsdp import FSDPModule

from disranker import fit, lora, spread, teacher
from disranker.contract import Tokens
from disranker.recipe import Finetune
from jobs.training import DDP

CPU = torch.device("cpu")
QUERIES = [f"{colour} {thing}" for colour in ("red", "blue", "warm") for thing in ("shoe", "jacket", "rain", "men")]
GROUPS = [
    {"query": query, "docs": [doc("a", f"{query} sale", grade=3), doc("b", "kids size", "light trail", grade=n % 3)]}
    for n, query in enumerate(QUERIES)
]
CFG = Finetune(
    epochs=2, lr=1e-2, tokens_per_batch=48, documents_per_list=2, workers=2, accumulate=2, validations=2,
    loss="pointwise", labels="grades",
)  # fmt: skip
LEAST_TOKENS = 12  # of a piece, under the name "pieces": the rows of a batch go in several, those of others at once
SETTINGS = {
    "ddp": CFG,
    "pieces": CFG.model_copy(update={"tokens_per_batch": 160, "epochs": 4}),  # 8 lists on one rank, 4 on the other
    "fsdp": CFG.model_copy(update={"sharding": "fsdp"}),
    "recompute": CFG.model_copy(update={"sharding": "fsdp", "recompute": True}),
    "lora": CFG.model_copy(update={"sharding": "fsdp", "lora_rank": 2}),
}


def fitted(cfg: Finetune, folder: Path, rank: int, ranks: int, stop: int | None = None, state=None) -> fit.Fit:
    tokens = Tokens.load(folder)
    task = teacher.Ranking(GROUPS, GROUPS[:4], tokens, cfg)
    model: nn.Module = teacher.scorer(folder, tokens, seed=1)
    if cfg.lora_rank:
        lora.adapt(model, cfg)
    if cfg.recompute:
        spread.recompute(model)
    if ranks > 1:
        whole = cfg.sharding == "ddp"
        model = nn.parallel.DistributedDataParallel(model, **DDP) if whole else spread.shard(model, cfg, CPU)
    return stepped(fit.Fit(model, task, fit.steps(task, cfg, 3, rank, ranks), cfg, rank), state, stop)


def worker(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found, usual = {}, teacher.LEAST_TOKENS
    for name, cfg in SETTINGS.items():
        teacher.LEAST_TOKENS = LEAST_TOKENS if name == "pieces" else usual
        run = fitted(cfg, folder, rank, 2)
        half = fitted(cfg, folder, rank, 2, stop=3)
        torch.save(half.state(), folder / f"{name}-{rank}.pt")
        state = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
        again = fitted(cfg, folder, rank, 2, state=state)
        last = spread.whole(run.model)
        run.finish()
        found[name] = {
            "curve": run.curve,
            "weights": last,
            "resumed": spread.whole(again.model),
            "resumed_curve": again.curve,
            "best": run.best,
            "at_best": spread.whole(run.model),
            "held": sum(weight.numel() for weight in spread.mine(run.model).values()),
            "sharded": isinstance(run.model, FSDPModule),
        }
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def found(folder):
    """What each rank found, by rank and name of the settings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, folder), nprocs=2)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


def numbers(curve: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([list(progress.values()) for progress in curve])


def near(one: spread.Weights, other: spread.Weights) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


@pytest.mark.parametrize("name", ["ddp", "pieces", "fsdp", "recompute"])
def test_2_workers_are_1_worker_with_the_batches_of_both(found, folder, name):
    """Ranks see different batches, the step is that of their mean: also where a worker holds half of each weight."""
    tokens, cfg = Tokens.load(folder), SETTINGS[name]
    task = teacher.Ranking(GROUPS, GROUPS[:4], tokens, cfg)
    ranks = [fit.steps(task, cfg, 3, rank, 2) for rank in range(2)]
    both = [one + other for one, other in zip(*ranks, strict=True)]
    alone = fit.Fit(teacher.scorer(folder, tokens, seed=1), task, both, cfg)
    list(alone.steps())
    assert near(found[0][name]["weights"], spread.whole(alone.model))
    norms = [one["gradient_norm"] for one in found[0][name]["curve"]]
    assert norms == pytest.approx([one["gradient_norm"] for one in alone.curve], rel=1e-3)


def test_the_pieces_of_a_batch_are_8_on_one_rank_and_6_on_the_other(folder):
    cfg = SETTINGS["pieces"]
    task = teacher.Ranking(GROUPS, GROUPS[:4], Tokens.load(folder), cfg)
    for steps in zip(*(fit.steps(task, cfg, 3, rank, 2) for rank in range(2)), strict=True):
        tokens = [int(task.batch(places).rows.real.sum()) for (places,) in steps]
        assert {min(teacher.PIECES, count // LEAST_TOKENS) for count in tokens} == {8, 6}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_ranks_end_with_the_same_weights_and_a_resumed_run_with_the_very_same(found, name):
    one, other = (rank[name] for rank in found)
    assert one["curve"] != other["curve"] and near(one["weights"], other["weights"])
    assert near(one["resumed"], one["weights"])
    assert numbers(one["resumed_curve"]) == pytest.approx(numbers(one["curve"]))


def test_a_worker_holds_all_weights_under_ddp_and_half_under_fsdp(found):
    whole = sum(weight.numel() for weight in found[0]["ddp"]["weights"].values())
    assert [rank["ddp"]["held"] for rank in found] == [whole, whole] and not found[0]["ddp"]["sharded"]
    assert sum(rank["fsdp"]["held"] for rank in found) == whole and found[0]["fsdp"]["sharded"]
    assert max(rank["fsdp"]["held"] for rank in found) < 0.6 * whole


def test_the_best_weights_come_back_whole(found):
    for name in SETTINGS:
        one = found[0][name]
        assert one["best"] == found[1][name]["best"]
        assert near(one["at_best"], one["weights"]) == (one["best"]["step"] == len(one["curve"]))


def test_only_adapters_and_head_are_trained_and_merged_they_give_the_same_scores(found, folder):
    tokens, cfg = Tokens.load(folder), SETTINGS["lora"]
    weights = found[0]["lora"]["at_best"]
    assert all("lora_" in name or "score" in name for name in weights) and len(weights) == 2 * 7 * 2 + 1
    model = teacher.scorer(folder, tokens, seed=1)
    before = copy.deepcopy(model)
    adapters = lora.adapt(model, cfg)
    spread.put(model, weights)
    batch = teacher.Ranking(GROUPS, [], tokens, cfg).batch([0, 1, 2])
    with torch.no_grad():
        adapted = teacher.raw_scores(model, batch.rows)
        lora.merge(adapters)
        merged = teacher.raw_scores(model, batch.rows)
        assert torch.allclose(adapted, merged, atol=1e-5)
        assert not torch.allclose(merged, teacher.raw_scores(before, batch.rows), atol=1e-3)
    assert type(model) is type(before) and model.state_dict().keys() == before.state_dict().keys()
