"""The review: one candidate a screen, judged blind with one key, by many people."""
