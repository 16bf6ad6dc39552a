"""Style sheets of the page and its plots: one palette for light, one for dark."""

from __future__ import annotations

import re

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
# c0..c6 are told apart by colour-blind readers too, and stand out from the paper by 4.5 to 1.
LIGHT = {
    **{"paper": "#ffffff", "wash": "#f6f8fa", "ink": "#1c2128", "soft": "#59636e"},
    **{"grid": "#e3e7ec", "warn": "#9a5b00", "sans": _FONT},
    **{"c0": "#0068b3", "c1": "#c2500a", "c2": "#00805a", "c3": "#a0449a", "c4": "#8a6a00"},
    **{"c5": "#56616c", "c6": "#8c2147"},
}
DARK = {
    **{"paper": "#10151c", "wash": "#171e27", "ink": "#e8ecf1", "soft": "#9aa5b1"},
    **{"grid": "#2a323c", "warn": "#e6ac4a", "sans": _FONT},
    **{"c0": "#5fb6f0", "c1": "#ff9050", "c2": "#3ccb9c", "c3": "#dc93d6", "c4": "#e3bc4e"},
    **{"c5": "#a8b3bf", "c6": "#f0809f"},
}
COLOURS = 7

PLOTS = """
svg text { font: 12px var(--sans); font-variant-numeric: tabular-nums; fill: var(--ink) }
svg .soft { fill: var(--soft) }
svg .strong { font-weight: 600 }
svg .middle { text-anchor: middle }
svg .end { text-anchor: end }
svg .inside { fill: var(--paper) }
svg text.own { fill: currentColor }
svg .own, svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 3px }
svg .grid { stroke: var(--grid); fill: none }
svg .axis { stroke: var(--soft); fill: none }
svg .lead { stroke: var(--soft); stroke-width: .75; fill: none }
svg .ceiling { stroke: var(--ink); stroke-dasharray: 5 4; fill: none }
svg .curve { stroke: currentColor; stroke-width: 1.5; stroke-linejoin: round; fill: none }
svg .curve.c0 { stroke-width: 2.5 }
svg .whisker { stroke: currentColor }
svg .dot { fill: currentColor; stroke: var(--paper); stroke-width: 1.25 }
svg .ring { fill: var(--paper); stroke: currentColor; stroke-width: 1.25 }
svg .bar { fill: currentColor }
svg .rest { color: var(--soft) }
svg .back { fill: var(--paper); stroke: var(--grid) }
""" + "\n".join(f"svg .c{i} {{ color: var(--c{i}) }}" for i in range(COLOURS))


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in palette.items())


PAGE = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
    + """
body { margin: 0 auto; max-width: 960px; padding: 24px 20px 64px;
  font: 16px/1.5 var(--sans); background: var(--paper); color: var(--ink) }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--grid) }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem }
p { max-width: 72ch; margin: .4rem 0 }
a { color: var(--c0) }
code, pre { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
pre { background: var(--wash); padding: 10px 12px; border-radius: 6px; overflow-x: auto }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 10px 24px }
.long { grid-column: 1 / -1; font-size: .875rem }
dt { font-size: .8rem; color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px }
summary { cursor: pointer }
footer { margin-top: 3rem; font-size: .875rem; color: var(--soft) }
.lead { font-size: 1.1rem; color: var(--soft) }
.scroll { overflow-x: auto }
figure { margin: 0; min-width: 0 }
figure.wide { margin: 2rem 0 }
figure.wide svg { max-width: 100%; min-width: 620px; height: auto }
figcaption { font-weight: 600; margin-bottom: 6px }
figcaption small { display: block; font-weight: 400; color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr));
  gap: 32px 40px; margin: 1.25rem 0 }
.cards svg { max-width: 100%; min-width: 400px; height: auto }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; margin: .75rem 0;
  font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); padding-bottom: 4px }
th, td { padding: 3px 16px 3px 0; text-align: left; vertical-align: top; white-space: nowrap;
  font-weight: 400 }
thead th { color: var(--soft); border-bottom: 1px solid var(--soft) }
tbody tr:not(.case) { border-bottom: 1px solid var(--grid) }
.case th { font-weight: 600; padding-top: 12px }
.n { text-align: right }
.ours { color: var(--c0) }
.ours th { font-weight: 600 }
.wrong { color: var(--c1); font-weight: 600; white-space: normal }
.reason { color: var(--soft); white-space: normal }
.reasons { font-size: .875rem; color: var(--soft); padding-left: 1.2em }
details { margin: .5rem 0 }
td details { margin: 0 }
td ul { margin: 2px 0 6px; padding-left: 1.1em }
.sum th, .sum td { font-weight: 600 }
.modelled { margin-top: 4rem; padding: 4px 20px 20px; background: var(--wash);
  border: 2px dashed var(--warn); border-radius: 10px }
.modelled h2 { color: var(--warn); border: 0; margin-top: .75rem; padding-top: 0 }
@media (max-width: 600px) {
  body { padding: 16px 14px 48px }
  .modelled { padding: 4px 12px 12px }
}
"""
)


def fixed(style: str, palette: dict[str, str]) -> str:
    """A style sheet without variables, for viewers of SVG that know none."""
    return re.sub(r"var\(--(\w+)\)", lambda match: palette[match[1]], style)
