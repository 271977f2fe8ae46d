"""The style sheet: colours for light and dark, screen and print.

One hue from pale to deep tells how near a value comes to its budget; orange, a cross and a word
tell a failure, so no meaning hangs on telling red from green.
"""

STYLE = """
:root { --paper: #fbfaf7; --ink: #1e2126; --dim: #686d76; --rule: #dedbd3; --stone: #24272c;
  --gold: #c9972f; --ok: #1c6e5a; --okbg: #dff0ea; --bad: #b8400b; --badbg: #fde8dc; --open:
  #7a5b00;
  --openbg: #f6ecd0; --fail: #e4581a; --cross: #ffffff; --equal: #e9ece9;
  --h0: #e6eff6; --h1: #d3e3ef; --h2: #b8d2e6; --h3: #97bedb; --h4: #72a5cb; --h5: #4c89b5; --h6:
  #0d4266; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e7e5df; --dim: #9aa0a8;
  --rule: #33373d; --stone: #0e1012; --gold: #ddb04e; --ok: #6fd3b4; --okbg: #12342b; --bad:
  #ff9a66;
  --badbg: #3d1c0c; --open: #e8c766; --openbg: #37300f; --fail: #ff7a38; --cross: #16181b; --equal:
  #24282c;
  --h0: #1d2a34; --h1: #203544; --h2: #244459; --h3: #2a5670; --h4: #326b8b; --h5: #3f83a8; --h6:
  #a5d4ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-print-color-adjust: exact;
  print-color-adjust: exact; font: 15px/1.5 ui-sans-serif, system-ui, "Segoe UI", "Helvetica Neue",
  "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
header { background: var(--stone); color: #f2efe8; border-bottom: 4px solid var(--gold); }
.inner, main { max-width: 1104px; margin: 0 auto; padding: 0 32px; }
.top { display: flex; justify-content: space-between; align-items: center; gap: 24px; padding-top:
  30px; }
.brand { margin: 0; color: var(--gold); letter-spacing: .22em; text-transform: uppercase;
  font-size: 12px; }
h1 { margin: 2px 0 6px; font-size: 34px; line-height: 1.15; font-weight: 600; overflow-wrap:
  anywhere; }
h1 small { font-weight: 300; color: #b9b6ae; font-size: 24px; }
.against { margin: 0; color: #b9b6ae; }
.stamp { margin: 0; padding: 6px 26px 10px; border: 3px solid; border-radius: 10px; font-size: 46px;
  line-height: 1.1; font-weight: 700; letter-spacing: .06em; text-transform: uppercase; }
.stamp.ok { color: #7fd9bd; } .stamp.bad { color: #ff9a66; }
.tiles { display: flex; flex-wrap: wrap; gap: 6px 44px; padding: 22px 0 20px; }
.tiles b { display: block; font-size: 23px; line-height: 1.2; font-weight: 600; }
.tiles span { color: #b9b6ae; font-size: 13px; }
section { padding: 26px 0 4px; }
.wide { overflow-x: auto; }
section + section { border-top: 1px solid var(--rule); margin-top: 22px; }
h2 { margin: 0 0 4px; font-size: 20px; font-weight: 600; }
h3 { margin: 16px 0 4px; font-size: 14px; font-weight: 600; }
h3 small, th small { margin-left: 8px; color: var(--dim); font-weight: 400; font-size: 13px; }
.caption { margin: 0 0 14px; color: var(--dim); max-width: 78ch; }
.empty, .dim { color: var(--dim); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 13px; }
svg .small { font-size: 12px; } svg .dim { fill: var(--dim); } svg .strong { font-weight: 600; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
.heat-0 { fill: var(--h0); } .heat-1 { fill: var(--h1); } .heat-2 { fill: var(--h2); }
.heat-3 { fill: var(--h3); } .heat-4 { fill: var(--h4); } .heat-5 { fill: var(--h5); }
.heat-6 { fill: var(--h6); } .heat-equal { fill: var(--equal); } .heat-fail { fill: var(--fail); }
.heat-none { fill: none; stroke: var(--dim); stroke-width: .8; stroke-dasharray: 2 2; }
.cross { stroke: var(--cross); stroke-width: 1.8; stroke-linecap: round; }
.axis, .grid { stroke: var(--rule); stroke-width: 1; }
.bar-equal { fill: var(--equal); } .bar-1 { fill: var(--h3); } .bar-2 { fill: var(--h4); }
.bar-3 { fill: var(--h5); } .bar-4 { fill: var(--h6); }
.line-engine { fill: none; stroke: var(--gold); stroke-width: 2.4; }
.line-yardstick { fill: none; stroke: var(--dim); stroke-width: 2.4; stroke-dasharray: 2 5;
  stroke-linecap: round; }
.dot { fill: var(--gold); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 0; font-size: 13px;
  color: var(--dim); align-items: center; }
.legend b { color: var(--ink); font-weight: 600; }
.legend .key { display: inline-block; width: 14px; height: 14px; margin-right: 6px; vertical-align:
  -2px; }
table { border-collapse: collapse; font-size: 14px; min-width: 62%; }
.verdicts { width: 100%; }
th { text-align: left; font-weight: 600; } td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
th, td { padding: 3px 9px; } th:first-child { padding-left: 0; }
td.split, th.split { padding-left: 24px; }
thead th { color: var(--dim); font-weight: 400; font-size: 13px; vertical-align: bottom; }
thead tr:last-child th { border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.badge { display: inline-block; min-width: 44px; padding: 0 8px; border-radius: 9px; text-align:
  center;
  font-size: 12.5px; line-height: 18px; }
.badge.ok { color: var(--ok); background: var(--okbg); }
.badge.bad { color: var(--bad); background: var(--badbg); font-weight: 700; text-transform:
  uppercase; }
.badge.open { color: var(--open); background: var(--openbg); }
.ribbon { margin: 0; display: flex; flex-wrap: wrap; gap: 5px; }
.token { position: relative; padding: 1px 6px 5px; border-radius: 4px; background: var(--equal);
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow:
  hidden;
  overflow-wrap: anywhere; }
.token b { position: absolute; left: 0; bottom: 0; height: 3px; background: var(--h4); }
.token i { font-style: normal; margin: 0 4px; font-weight: 700; }
.token.tie { background: var(--openbg); color: var(--open); }
.token.wrong { background: var(--badbg); color: var(--bad); outline: 2px solid var(--fail); }
.failure { border-left: 5px solid var(--fail); padding: 16px 0 12px 22px; margin-top: 28px; }
.failure h2 { color: var(--bad); } .failure p { margin: 2px 0 12px; overflow-wrap: anywhere; }
.failure + section { border-top: 0; margin-top: 0; }
dl { margin: 0; display: grid; grid-template-columns: 1fr 1fr; gap: 2px 32px; }
dl div { display: flex; gap: 12px; } dt { flex: 0 0 78px; color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 14px 0 4px; padding: 8px 12px; border-radius: 6px; background: var(--equal);
  white-space: pre-wrap;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin: 14px 0 0; } summary { cursor: pointer; font-weight: 600; }
.matrix { font-size: 12.5px; } .matrix td { overflow-wrap: anywhere; }
.mark { text-align: center; } .mark.killed { background: var(--h2); }
.mark.alive { background: var(--equal); color: var(--dim); }
.provenance dl { grid-template-columns: 1fr; font-size: 13px; } .provenance { padding-bottom: 40px;
  }
@media (max-width: 760px) { .inner, main { padding: 0 14px; } .wide > svg { min-width: 720px; }
  dl { grid-template-columns: 1fr; } .top { flex-wrap: wrap; } }
@media print { :root { --paper: #fff; } body { font-size: 12px; } section { break-inside: avoid; }
  .wide { overflow: visible; }
  .inner, main { max-width: none; padding: 0 6mm; } }
"""
