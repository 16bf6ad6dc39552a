"""Parts of a training loop for Kimi K2.5: what torch does not have, beside what it has.

`muon` and `qk_clip` together are MuonClip, `balance` moves the router's selection bias, `schedule`
gives the learning rate, `resume` keeps a run alive. The loop itself is the caller's.
"""
