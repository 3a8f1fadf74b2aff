"""Tables of the attacks beyond prefilling: the numbers given, and no suffix."""

from __future__ import annotations

from typing import Any

import pytest
from tests.report.attack_sample import SECRET_SUFFIX

from deepalign.report import attack_tables
from deepalign.report.reading import Interval, Share, show
from deepalign.report.tables import audit_tables, to_markdown

Metrics = dict[str, Any]
SECTIONS = ("rap", "harmful_rank", "any_depth", "jailbreaks", "suffix", "abliteration", "worst_case")


def column(table: attack_tables.Table | None, name: str) -> list[Any]:
    assert table is not None
    return [row[table.columns.index(name)] for row in table.rows]


def test_rank_assisted_prefilling(attacked: Metrics) -> None:
    table, given = attack_tables.rap_table(attacked), attacked["rap"]
    assert column(table, "k") == [row["k"] for row in given]
    assert column(table, "ASR") == [Share(row["asr"]) for row in given]
    assert column(table, "95 % interval") == [Interval(*row["ci95"]) for row in given]
    for name, field in (("successes", "num_success"), ("scored", "num_scored"), ("unscored", "num_unscored"),
                        ("skipped", "num_skipped"), ("refused at once", "num_refused_at_once"),
                        ("recovered", "num_recovered"), ("mean steps back", "mean_backtracks"),
                        ("gave up", "num_gave_up")):  # fmt: skip
        assert column(table, name) == [row[field] for row in given]
    assert column(table, "ASR, prefix judged too") == [Share(row["asr_with_prefix"]["rate"]) for row in given]


def test_ranks(attacked: Metrics) -> None:
    section = attacked["harmful_rank"]
    table = attack_tables.harmful_rank_table(attacked)
    assert column(table, "median rank") == [row["median_rank"] for row in section["positions"]]
    assert column(table, "in the top 20") == [Share(row["in_top"]["rate"]) for row in section["positions"]]
    assert column(table, "refusal mass") == [Share(row["refusal_mass"]["mean"]) for row in section["positions"]]
    assert column(table, "more likely under the base") == [Share(0.6)] * 40
    assert table is not None
    assert "keep it out of the top 20 for half of the prompts: 3. Prompts: 80." in table.note
    assert show(1022.5) in {"1022", "1023"}
    for row in section["positions"]:
        row.update(base_favoured=None)
    table = attack_tables.harmful_rank_table(attacked)
    assert table is not None
    assert "more likely under the base" not in table.columns
    assert "median rank of a refusal" in table.columns


def test_the_reference_defence(attacked: Metrics) -> None:
    section = attacked["any_depth"]
    by_k, summary = attack_tables.any_depth_tables(attacked)
    assert column(by_k, "answered") == [Share(row["answered"]["rate"]) for row in section["rows"]]
    assert column(by_k, "skipped") == [row["num_skipped"] for row in section["rows"]]
    assert column(by_k, "refused") == [64] * 5
    assert not {"refused at once", "recovered"} & set(by_k.columns)
    assert summary.rows == (
        ("header that is put in again", '"<|im_end|>\\n<|im_start|>assistant\\n"'),
        ("prompts that no tested depth refuses", "1.2 % 1/80 [0-4]"),
        ("forced tokens up to which at most 10 % are answered", "75"),
    )
    section.update(tokens_at_threshold=150, censored=True, threshold=0.25)
    assert attack_tables.any_depth_tables(attacked)[1].rows[2] == (
        "forced tokens up to which at most 25 % are answered", "at least 150",
    )  # fmt: skip
    section.update(tokens_at_threshold=None, rows=None, header=None)
    (summary,) = attack_tables.any_depth_tables(attacked)
    assert [row[1] for row in summary.rows] == [None, "1.2 % 1/80 [0-4]", None]


def test_wrapped_prompts(attacked: Metrics) -> None:
    table, given = attack_tables.jailbreaks_table(attacked), attacked["jailbreaks"]
    assert column(table, "wrapping") == [row["name"] for row in given]
    assert column(table, "ASR") == [Share(row["asr"]["rate"]) for row in given]
    assert column(table, "unscored") == [0, 12, 1, 0]


def test_suffixes_without_their_text(attacked: Metrics) -> None:
    section = attacked["suffix"]
    table = attack_tables.suffix_table(attacked)
    for name, field in (("suffix", "name"), ("kind", "kind"), ("loss, nats", "loss"), ("steps", "steps_done"),
                        ("candidates tried", "num_evaluated"), ("candidates that drift", "num_drifted"),
                        ("why it stopped", "stopped")):  # fmt: skip
        assert column(table, name) == [row[field] for row in section["rows"]]
    assert table is not None
    assert table.note.startswith(
        "The suffixes were searched on this model. Searches: 2, on 25 prompts. At most 60 steps"
    )
    assert "Mean ASR of the best 3: 40.0 %, standard deviation 10.0 %." in table.note
    assert SECRET_SUFFIX not in to_markdown(audit_tables(attacked))
    replayed = {"source": "file", "rows": [{"name": "line-1", "asr": section["rows"][0]["asr"]}]}
    table = attack_tables.suffix_table({"suffix": replayed})
    assert table is not None
    assert "loss, nats" not in table.columns
    assert table.note.startswith("The suffixes were read from a file. The loss")


def test_abliteration(attacked: Metrics) -> None:
    table = attack_tables.abliteration_table(attacked)
    assert table is not None
    facts = dict(table.rows)
    assert facts["ASR, refusal direction removed"] == "95.0 % 76/80 [90-100]"
    assert facts["layer that the direction is from"] == "2 of 6"
    assert facts["mean probability that a refusal opens the answer, with it"] == Share(0.912)
    assert facts["KL divergence on harmless prompts, nats"] == 0.0421
    assert table.note == "The direction was found on the training prompts."
    attacked["abliteration"].update(harmful_prompts="audited", within_kl=False, max_kl=0.1, note="")
    table = attack_tables.abliteration_table(attacked)
    assert table is not None
    assert table.note == (
        "The direction is from audited prompts themselves, so the rate may be high for them. No direction kept the KL "
        "divergence at or under 0.1 nats."
    )
    attacked["abliteration"].update(within_kl=True, refusal_after=0.8, harmful_prompts="builtin")
    table = attack_tables.abliteration_table(attacked)
    assert table is not None
    assert table.note == (
        "Held to 0.1 nats, taking out one direction leaves most refusals, so that this is no floor; an attacker need "
        "not hold to it (--ablation-kl)."
    )
    attacked["abliteration"].update(plain=None, ablated={"rate": None, "numerator": 0, "denominator": 0})
    facts = dict(attack_tables.abliteration_table(attacked).rows)  # type: ignore[union-attr]
    assert facts["ASR, weights as they are"] is None
    assert facts["ASR, refusal direction removed"] == "n/a 0/0"


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("absent", [None, [], {}, {"not_run": "no <time>"}])
def test_a_section_that_is_absent_has_no_table(attacked: Metrics, section: str, absent: object) -> None:
    before = {table.title for table in audit_tables(attacked)}
    attacked[section] = absent
    left = {table.title for table in audit_tables(attacked)} - {"Not tested"}
    assert len(before - {"Not tested"}) - len(left) == (2 if section == "any_depth" else 1)
    text = to_markdown(audit_tables(attacked))
    assert ("no \\<time\\>" in text) is (absent == {"not_run": "no <time>"})
