"""Sections for test_gpu_check.py."""

import os
import time


def good(check, subject):
    check.figure(subject, "work", seconds=0.5)
    check.passed("it is good", True)


def crash(check):
    check.passed("before the crash", True)
    os._exit(3)


def hang(check):
    check.passed("before the hang", True)
    time.sleep(600)


def wrong(check):
    raise ValueError("no such | thing")
