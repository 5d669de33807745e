"""docs/scale.md says what `bench.scale` works out."""

import dataclasses

import pytest
from conftest import ROOT

from bench import scale

SHOP, HARDWARE, MEASURED = scale.Shop(), scale.Hardware(), scale.Measured()


def found(**changed):
    shop = dataclasses.replace(SHOP, **changed)
    return {row.stage: row for row in scale.rows(shop, HARDWARE, MEASURED)}


def test_the_table_in_the_docs_is_what_the_program_says(capsys):
    assert scale.main([]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "scale.md").read_text()


def test_gpu_hours_are_operations_over_what_a_card_does():
    row = found()["pretrain, once"]
    operations = 20e6 * 180 * 7.07e9 * 6
    assert row.gpu_hours == pytest.approx(operations / (989e12 * 0.4) / 3600)
    assert found(clicked=40_000_000)["pretrain, once"].gpu_hours == pytest.approx(2 * row.gpu_hours)


def test_twice_the_searches_are_twice_the_logs_and_the_replicas_and_nothing_else():
    once, twice = found(), found(searches=2 * SHOP.searches)
    for stage in once:
        times = 2 if stage.split(",")[0] in ("ingest", "aggregate", "serve") else 1
        assert twice[stage].core_hours == pytest.approx(times * once[stage].core_hours)
        assert twice[stage].gpu_hours == pytest.approx(once[stage].gpu_hours)


def test_a_price_is_an_option(capsys):
    scale.main(["--gpu-price", "6"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "pretrain" in line]
    (before,) = [line for line in scale.table(SHOP, HARDWARE, MEASURED).splitlines() if "pretrain" in line]
    assert float(line.split("|")[-2]) == pytest.approx(2 * float(before.split("|")[-2]), rel=0.01)
