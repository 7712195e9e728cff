"""The page that ``netslot audit --report`` writes: one self-contained HTML file with its picture inside."""

from __future__ import annotations

from html import escape

from netslot.rulesets.audit import Audit
from netslot.rulesets.flaws import Flaw

_WIDTH, _HEIGHT = 860, 320
_LEFT, _BOTTOM, _TOP, _RIGHT = 70, 40, 16, 16
_COLOURS = {"NEW": "#b3412e", "ESTABLISHED": "#2e6fb3"}
_MOST_POINTS = 1500
_MOST_FLAWS = 200

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #ddd; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } code { font-size: 13px; }
svg { background: #fafafa; border: 1px solid #ddd; } .big { font-size: 1.1rem; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd; } svg { background: #1e2126; border-color: #444; }
  svg text { fill: #ccc; } td, th { border-color: #444; } }
"""


def html_report(result: Audit) -> str:
    """The whole page."""
    body = [
        "<h1>What the firewall rules of this host cost</h1>",
        f"<p class=big>{_summary(result)}</p>",
        "<h2>Rules that a packet is tested against, by the tenant's position</h2>",
        _picture(result),
        "<p>One dot for each tenant, in the order in which the dump first names them: the most rules that a TCP "
        "packet of the tenant meets on its way through the host, to or from an address and a port that no rule "
        f"names. {_legend()}</p>",
        "<h2>Chain by chain</h2>",
        _chains(result),
        "<h2>What stands out</h2>",
        "<ul>" + "".join(f"<li>{escape(finding.text)}</li>" for finding in result.findings) + "</ul>",
        "<h2>Distance to limits of the kernel</h2>",
        _limits(result),
        _flaws(result.flaws),
    ]
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>netslot audit</title><style>{_STYLE}</style>{''.join(body)}</html>\n"
    )


def _summary(result: Audit) -> str:
    per_tenant = result.rules_per_tenant()
    if not result.tenants:
        return f"{result.rules:,} rules, in which no tenant can be recognised."
    return (
        f"{result.rules:,} rules: {result.tenants:,} tenants with {per_tenant['median']:,} each (median), and "
        f"{result.global_rules():,} common ones. {result.class_count} classes of tenants whose rules differ only in "
        f"names and addresses. A packet is tested against up to <b>{result.walks.longest:,}</b> rules."
    )


def _legend() -> str:
    return " ".join(
        f'<span style="color:{colour}">&#9679;</span> {state.lower()} connection'
        for state, colour in _COLOURS.items()
    )


def _picture(result: Audit) -> str:
    """Dots of both states over the position of the tenant."""
    totals = result.walks.totals
    count = len(totals["NEW"])
    highest = max(result.walks.longest, 1)
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(index: int) -> float:
        return _LEFT + plot_width * (index + 0.5) / count

    def y(tested: int) -> float:
        return _TOP + plot_height * (1 - tested / highest)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="rules tested by tenant position">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        level = round(highest * share)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}" stroke="#8884"/>'
            f'<text x="{_LEFT - 8}" y="{y(level) + 4:.1f}" font-size="12" text-anchor="end">{level:,}</text>'
        )
    step = max(1, count // _MOST_POINTS)
    for state, colour in _COLOURS.items():
        dots = "".join(f"M{x(index):.1f} {y(totals[state][index]):.1f}h0" for index in range(0, count, step))
        parts.append(f'<path d="{dots}" stroke="{colour}" stroke-width="3.4" stroke-linecap="round" opacity=".7"/>')
    for index in sorted({0, count // 2, count - 1}):
        parts.append(
            f'<text x="{x(index):.1f}" y="{_HEIGHT - 16}" font-size="12" text-anchor="middle">{index + 1:,}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _chains(result: Audit) -> str:
    rows = ["<tr><th>chain<th>packet<th>first tenant<th>median<th>worst<th>worst tenant (position)"]
    for chain in result.chains:
        name = escape(f"{chain.table} {chain.chain} (IPv{chain.family})")
        for state, spread in chain.states.items():
            cells = "".join(f"<td class=n>{spread[key].tested:,}" for key in ("first", "median", "worst"))
            worst = spread["worst"]
            rows.append(f"<tr><td>{name}<td>{state}{cells}<td>{escape(worst.tenant)} ({worst.position:,})")
            name = ""
    return f"<table>{''.join(rows)}</table>"


def _limits(result: Audit) -> str:
    rows = ["<tr><th>limit<th>used<th>of<th>where the kernel says so"]
    rows += [
        f"<tr><td>{escape(limit.name)}<td class=n>{limit.used:,}<td class=n>{limit.limit:,}<td>{escape(limit.source)}"
        for limit in result.limits
    ]
    return f"<table>{''.join(rows)}</table>"


def _flaws(flaws: list[Flaw]) -> str:
    if not flaws:
        return ""
    rows = ["<tr><th>line<th>rule<th>why"]
    rows += [
        f"<tr><td class=n>{flaw.rule.line}<td><code>{escape(f'-A {flaw.chain} {flaw.rule.text}')}</code>"
        f"<td>{escape(flaw.kind)}: {escape(flaw.reason)}"
        for flaw in flaws[:_MOST_FLAWS]
    ]
    more = f"<p>And {len(flaws) - _MOST_FLAWS:,} more.</p>" if len(flaws) > _MOST_FLAWS else ""
    return f"<h2>Rules that do nothing</h2><table>{''.join(rows)}</table>{more}"
