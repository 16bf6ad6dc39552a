"""Parts of a training loop for Kimi K2.5: what torch does not have, beside what it has.

`muon` and `qk_clip` together are MuonClip, `experts` are the routed experts with a gradient,
`balance` moves the router's selection bias and has the loss of a sequence, `schedule` gives the
learning rate, `resume` keeps a run alive. The loop itself is the caller's.
"""
