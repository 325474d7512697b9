"""How report.html looks."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 1060px; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.6em; margin-bottom: .1em }
h2 { font-size: 1.15em; margin: 1.8em 0 .5em }
table { border-collapse: collapse }
td, th { padding: .25em .9em .25em 0; text-align: right; vertical-align: top }
th { font-weight: 600; border-bottom: 1px solid #ccd }
td:first-child, th:first-child { text-align: left }
summary { cursor: pointer }
details { margin-top: 1.5em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0; padding: .5em .7em; background: #f5f6f9;
      border-radius: 4px; font: 13px/1.4 ui-monospace, monospace }
.sub, .label { color: #667 }
.label { font-size: .85em }
.side { font-weight: 600; margin-top: .5em }
.se { color: #889; font-size: .85em }
.up { color: #14763c; font-weight: 600 }
.down { color: #a8321f; font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: .8em }
.plots img { width: 100% }
.ask { border: 1px solid #dde; border-radius: 6px; padding: .8em 1em; margin: .8em 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
.group { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 1em; margin-top: .6em }
.group pre span { border-radius: 2px }
.right { border-left: 3px solid #2a9d5c }
.wrong { border-left: 3px solid #c9503c }
.note { background: #fff8e6; border-radius: 6px; padding: .5em .9em; margin: .4em 0 }
"""
