"""How many held-out samples of each task a checkpoint answers right: `kimi-ops eval`.

`answers` asks the model, `scores` counts, `router` watches which experts are chosen meanwhile,
`command` is the command line.
"""
