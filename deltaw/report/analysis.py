"""The page of `deltaw analyse`: sizes, spectra, subspaces and the base's weights, each figure with what it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from deltaw.analyse import Analysis, Finding, Share, findings
from deltaw.analyse.study import BASE, AdapterStudy, PairStudy, SimilarityMap
from deltaw.report.bars import bar_chart
from deltaw.report.chart import Line, line_chart
from deltaw.report.heatmap import colour_scale, heat_map
from deltaw.report.page import figure, finding, folded, heading, page, section, side_by_side
from deltaw.report.table import Cell, Column, number, table
from deltaw.train.forgetting import Forgetting

_NOTE = ("Norms are Frobenius norms of s·BA. Effective rank is the exponential of the entropy of σ/Σσ; stable rank is "
         "‖ΔW‖_F²/‖ΔW‖₂². Random comparisons are drawn with a fixed seed.")
_SIDES = {"A": "A: right singular vectors", "B": "B: left singular vectors", "input": "ΔW: input side",
          "output": "ΔW: output side", "random": "two random matrices"}


def analysis_page(analysis: Analysis, forgetting: Sequence[Forgetting] = (), text: str = "") -> str:
    """The page as text; `text` names what forgetting was measured on."""
    said = findings(analysis)
    names = [study.name for study in analysis.adapters] or [row.adapter for row in forgetting]
    title = f"What {' and '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)} change"
    lead = "ΔW = s·BA at every site, from the factors alone. Base: " + (
        next((study.base for study in analysis.adapters if study.base), "") or "not recorded")
    sections = [
        section("At a glance", finding(*_texts(said, "size")) + _glance(analysis.adapters, forgetting)),
        section("Where the change is", _budget(analysis, said), "share of the parameters, and of Σ‖ΔW‖²"),
        section("Over how many directions it is spread", _spectra(analysis, said)),
        section("What the adapters have in common", _pairs(analysis, said),
                "φ(i, j) = ‖U_iᵀV_j‖² / min(i, j) of the first i and the first j directions (LoRA paper, eq. 4, Figs 3 "
                "and 4): 1 where one span contains the other, 0 where they are orthogonal"),
        section("ΔW against W", _against_base(analysis, said),
                "amplification = ‖ΔW‖ / ‖UᵀWV‖ with U, V the directions of ΔW (LoRA paper, section 7.3, Table 7)"),
        section("Intruder dimensions", _intruders(analysis, said),
                "strong directions of W + ΔW that no singular vector of W resembles (Shuttleworth et al. 2024)"),
        section("Forgetting", _forgetting(forgetting, text)),
        section("Every site", _sites(analysis.adapters)),
    ]
    return page(title, sections, lead=lead, footer=_NOTE)


def describe_forgetting(row: Forgetting, text: str) -> str:
    """What a forgetting probe says."""
    change = row.after - row.before
    effect = "no worse" if change <= 0 else f"{change / row.before:.1%} worse"
    return (f"With {row.adapter} the loss on {text or 'general text'} goes from {row.before:.4f} to {row.after:.4f} "
            f"(perplexity {row.perplexities[0]:.2f} to {row.perplexities[1]:.2f}): {effect}, over {row.tokens:,} "
            "tokens.")


def _texts(said: Iterable[Finding], part: str, about: Sequence[str] | None = None) -> list[str]:
    return [f.text for f in said if f.section == part and (about is None or f.about == tuple(about))]


def _glance(studies: Sequence[AdapterStudy], forgetting: Sequence[Forgetting]) -> str:
    based, probed = any(s.against_base for s in studies), {f.adapter: f for f in forgetting}
    columns = [Column("adapter"), Column("rank"), Column("seed", True), Column("sites", True),
               Column("parameters", True), Column("‖ΔW‖", True), Column("effective rank", True)]
    columns += [Column(n, True) for n in (("‖ΔW‖/‖W‖", "amplification", "intruders") if based else ())]
    columns += [Column("general text", True)] if probed else []
    rows = []
    for study in studies:
        row: list[str | Cell] = [
            study.name, "/".join(map(str, study.ranks)), number(study.seed, "d"),
            Cell(str(len(study.sites)), len(study.sites)), number(study.parameters, ","), number(study.frobenius),
            number(_median([s.effective_rank for s in study.sites]), ".1f")]
        if based:
            row += [number(_median([r.relative for r in study.against_base]), ".2%"),
                    number(_median([r.factor for r in study.against_base])),
                    number(sum(i.count for i in study.intruders), "d")]
        if probed:
            loss = probed[study.name].after - probed[study.name].before if study.name in probed else None
            row.append(number(loss, "+.4f"))
        rows.append(row)
    others = [f"{s.name} also holds {len(s.left_out)} sites that are no product of two factors (biases, saved modules)."
              for s in studies if s.left_out]
    return table(columns, rows, caption="The adapters; ratios are those of the median site", sortable=True) + \
        finding(*others)


def _budget(analysis: Analysis, said: Sequence[Finding]) -> str:
    parts = [finding(*_texts(said, "budget"))]
    for study in analysis.adapters:
        shares = {share.name: (share.parameter_share, share.change_share) for share in study.kinds}
        parts.append(figure(bar_chart(shares, ("parameters", "change"), label=f"{study.name} by kind of site"),
                            f"{study.name}, by kind of site"))
    lines = [Line(study.name, [(float(s.name), s.change_share) for s in study.layers if s.name != "-"], _style(k),
                  dots=True) for k, study in enumerate(analysis.adapters) if len(study.layers) > 1]
    parts.append(figure(line_chart(lines, x_label="layer", y_label="share of the change"),
                        "Share of Σ‖ΔW‖² by layer"))
    parts += [folded(f"{study.name} by layer", _shares(study.layers, study.name)) for study in analysis.adapters]
    return "\n".join(parts)


def _shares(shares: Sequence[Share], name: str) -> str:
    columns = [Column("layer"), *(Column(n, True) for n in ("sites", "parameters", "of all", "‖ΔW‖", "of the change",
                                                         "effective rank"))]
    rows = [(s.name, str(s.sites), number(s.parameters, ","), number(s.parameter_share, ".1%"), number(s.frobenius),
             number(s.change_share, ".1%"), number(s.effective_rank, ".1f")) for s in shares]
    return table(columns, rows, caption=f"{name} by layer", sortable=True)


def _spectra(analysis: Analysis, said: Sequence[Finding]) -> str:
    charts = []
    for site in analysis.drawn:
        lines = [Line(study.name, [(float(k), value / s.spectral) for k, value in enumerate(s.singular_values, 1)],
                      _style(n), dots=len(s.singular_values) < 20)
                 for n, study in enumerate(analysis.adapters) for s in study.sites if s.site == site and s.spectral]
        charts.append(figure(line_chart(lines, x_label="direction", y_label="σ / σ₁"),
                             f"{site}: singular values of ΔW over the largest"))
    return finding(*_texts(said, "spectrum")) + "\n".join(charts)


def _pairs(analysis: Analysis, said: Sequence[Finding]) -> str:
    parts = []
    for pair in analysis.pairs:
        parts += [heading(f"{pair.first} and {pair.second}"), finding(*_texts(said, "pair", (pair.first, pair.second)))]
        for site in analysis.drawn:
            maps = [m for m in analysis.maps if (m.first, m.second, m.site) == (pair.first, pair.second, site)]
            parts.append(_map_row(maps, said, f"{site}: φ of the first i directions of {pair.first} and the first j of "
                                  f"{pair.second}"))
        parts.append(folded(f"{pair.first} and {pair.second} at {len(pair.sites)} sites", _pair_table(pair)))
    return "\n".join(parts)


def _map_row(maps: Sequence[SimilarityMap], said: Sequence[Finding], caption: str) -> str:
    if not maps:
        return ""
    texts = [f"{_SIDES[m.side]}. {text}" for m in maps
             for text in _texts(said, "map", (m.first, m.second, m.site, m.side))]
    pictures = [heat_map(m.phi, title=_SIDES[m.side], x_label=f"j, of {_weight(m.second)}", y_label=f"i, of {m.first}")
                for m in maps]
    return figure(side_by_side(pictures) + colour_scale(label="φ"), caption) + finding(*texts)


def _pair_table(pair: PairStudy) -> str:
    columns = [Column("site"), *(Column(n, True) for n in ("cosine of ΔW", "‖ΔW₁ - ΔW₂‖", "φ(1,1) of A", "φ(1,1) input",
                                                           "φ(1,1) output", "φ of spans", "random", "Grassmann"))]
    rows = [(s.site, *(number(v, ".3f") for v in (s.cosine, s.distance, s.top_A, s.top_input, s.top_output,
                                                  s.whole_input, s.random_input, s.grassmann))) for s in pair.sites]
    return table(columns, rows, caption=f"{pair.first} and {pair.second} site by site; Grassmann distance from 0 to 1",
                 sortable=True)


def _against_base(analysis: Analysis, said: Sequence[Finding]) -> str:
    every = [(study.name, row) for study in analysis.adapters for row in study.against_base]
    if not every:
        return ""
    columns = [Column("site"), Column("adapter"), *(Column(n, True) for n in (
        "r", "‖W‖", "‖ΔW‖", "‖UᵀWV‖ of ΔW", "of W's top", "of random", "amplification", "in W's top", "by chance"))]

    def rows(only: Sequence[str] | None) -> list[Sequence[str | Cell]]:
        return [(r.site, name, number(r.rank, "d"), number(r.weight), number(r.change), number(r.through_change),
                 number(r.through_top), number(r.through_random), number(r.factor), number(r.top_overlap, ".0%"),
                 number(r.top_overlap_random, ".0%")) for name, r in every if only is None or r.site in only]

    maps = [m for m in analysis.maps if m.second == BASE]
    drawn = [_map_row([m for m in maps if m.site == site and m.first == study.name], said,
                      f"{site}: φ of ΔW's input directions and W's largest") for site in analysis.drawn
             for study in analysis.adapters]
    return "\n".join([
        finding(*_texts(said, "base")),
        table(columns, rows(analysis.drawn), caption="Table 7 of the LoRA paper, for the sites drawn", sortable=True),
        *drawn, folded(f"all {len(every)} sites", table(columns, rows(None), caption="Every site", sortable=True))])


def _intruders(analysis: Analysis, said: Sequence[Finding]) -> str:
    rows = [(i.site, study.name, number(i.count, "d"), str(len(i.cosines)), number(min(i.cosines), ".3f"))
            for study in analysis.adapters for i in study.intruders]
    columns = [Column("site"), Column("adapter"), *(Column(n, True) for n in ("intruders", "of", "least cosine"))]
    listed = table(columns, rows, caption="Intruders by site", sortable=True)
    return finding(*_texts(said, "intruders")) + folded(f"{len(rows)} sites", listed) if rows else ""


def _forgetting(rows: Sequence[Forgetting], text: str) -> str:
    columns = [Column("adapter"), *(Column(n, True) for n in ("loss without", "loss with", "perplexity without",
                                                              "perplexity with"))]
    cells = [(r.adapter, number(r.before, ".4f"), number(r.after, ".4f"), *(number(p, ".2f") for p in r.perplexities))
             for r in rows]
    return finding(*(describe_forgetting(row, text) for row in rows)) + \
        table(columns, cells, caption=f"Loss on {text or 'general text'}", sortable=True)


def _sites(studies: Sequence[AdapterStudy]) -> str:
    columns = [Column("site"), Column("shape"), *(Column(n, True) for n in (
        "rank", "parameters", "‖ΔW‖", "‖ΔW‖₂", "stable rank", "effective rank"))]
    parts = []
    for study in studies:
        rows = [(s.site, " × ".join(map(str, s.shape)), number(s.rank, "d"), number(s.parameters, ","),
                 number(s.frobenius), number(s.spectral), number(s.stable_rank, ".2f"), number(s.effective_rank, ".2f"))
                for s in study.sites]
        listed = table(columns, rows, caption=study.name, sortable=True)
        parts.append(folded(f"{study.name}: {len(rows)} sites", listed))
    return "\n".join(part for part in parts if part)


def _weight(name: str) -> str:
    return "W's largest" if name == BASE else name


def _style(number_of: int) -> str:
    return f"s{number_of % 6 + 1}"


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
