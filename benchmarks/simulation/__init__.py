"""Discrete-event replay of a deployment. Simulated are machines, networks and texts; all policy is the service's own.

``benchmarks/simulate.py`` is its command. A simulated target runs the real ``Scheduler`` with its governor and
pipeline, a simulated drafter the real ``DraftWorker``; steps and draft calls take simulated time, by cost curves, and
what the target accepts is what recorded traces say it accepted.
"""
