"""The meta-gradient: one engine (batching, unrolling, planning), and the algorithms over it, one file each."""
