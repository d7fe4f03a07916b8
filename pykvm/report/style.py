"""The look of the HTML pages: colours for light and dark, cards, tables."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #5b6572; --rule: #dfe3e8;
  --block: #3b6fb6; --final: #d9822b;
  --good: #18794e; --good-soft: #e2f3ea; --bad: #b42318; --bad-soft: #fdeae7;
  --h0: #eef0f3; --h1: #d3e2f4; --h2: #a9c8ea; --h3: #74a6da; --h4: #4381c4; --h5: #245b9c; --h6: #0f3568; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1c2026; --ink: #e6e9ed; --soft: #9aa4b1; --rule: #323a44;
  --block: #5b94de; --final: #e89a4d;
  --good: #5fd09a; --good-soft: #173527; --bad: #ff8f81; --bad-soft: #43201c;
  --h0: #262c34; --h1: #1d3a5c; --h2: #24558a; --h3: #3373b5; --h4: #5596d8; --h5: #8cbcec; --h6: #d2e6fb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 24px; margin: 0; font-weight: 650; }
h2 { font-size: 16px; margin: 0 0 4px; font-weight: 650; }
header { display: flex; flex-wrap: wrap; gap: 6px 16px; align-items: center; margin-bottom: 20px; }
header p { flex-basis: 100%; margin: 0; color: var(--soft); }
.verdict { font-weight: 650; padding: 3px 12px; border-radius: 999px; }
.good { color: var(--good); background: var(--good-soft); }
.bad { color: var(--bad); background: var(--bad-soft); }
.problem { border-left: 4px solid var(--bad); background: var(--bad-soft); padding: 10px 14px;
  margin: 0 0 20px; border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 12px; margin-bottom: 16px; }
section, .tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 21px; font-weight: 650; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile span, .note { color: var(--soft); font-size: 13px; }
.note { margin: 0 0 14px; }
section { padding: 18px 20px; margin-bottom: 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: 13px; }
tbody tr:last-child td { border-bottom: 0; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { text-align: left; padding-right: 0; width: 26%; }
.bar { height: 10px; border-radius: 3px; background: var(--block); min-width: 1px; }
.final .bar { background: var(--final); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
svg { display: block; width: 100%; min-width: 640px; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.axis { fill: var(--soft); } .label { fill: var(--ink); }
.grid { stroke: var(--rule); } .tick { stroke: var(--soft); }
.wrong { fill: var(--bad); }
.block { fill: var(--block); stroke: var(--card); } .block.final { fill: var(--final); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 8px;
  font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 14px; border-radius: 3px;
  margin-right: 6px; vertical-align: -2px; }
""" + "".join(f".h{n} {{ fill: var(--h{n}); }} i.h{n} {{ background: var(--h{n}); }}\n" for n in range(7))
