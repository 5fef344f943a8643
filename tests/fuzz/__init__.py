# SPDX-License-Identifier: Apache-2.0
"""A fuzzer: random programs against a model in float64, and mutated state dicts. See __main__."""
