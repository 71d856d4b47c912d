"""What becomes of freed memory, asked of the system. In processes of their own: it is decided for a whole process, once."""

import platform
import subprocess
import sys

import pytest
from conftest import ROOT

TIMES = 40
PAGES = TIMES * 32 * 2**20 // 4096  # at least, if every large tensor's are new; where pages are larger there are fewer

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="the C library is not glibc: it is left as it is"
)

COUNT = f"""
import resource, torch
TIMES = {TIMES}

def new_pages():  # of large tensors that are freed at once, one after the other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.zeros(40 * 2**18).add_(1)  # 40 MiB: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
"""


def said(code: str) -> list[int]:
    """The integers that a new process prints."""
    command = [sys.executable, "-c", COUNT + code]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


@glibc
def test_freed_memory_is_taken_anew_by_default_and_used_again_once_it_is_kept():
    code = """
from meme.support.memory import keep_freed_memory
print(new_pages())
keep_freed_memory()
print(new_pages())
"""
    anew, kept = said(code)
    if anew < PAGES:
        pytest.skip("the system maps larger pages, or keeps freed memory, by itself")
    assert kept < anew / 4  # not at once: what is small may take a place in what was freed, and the next that is large is new


@glibc
def test_training_keeps_it():
    code = """
from meme import preset
from meme.data.images import open_images
from meme.training.trainer import train_expert
config = preset("digits-meme").with_(training={"steps": 1})
train_expert(config, 1, open_images("digits", size=8, channels=1))
print(new_pages())
"""
    assert said(code)[0] < PAGES / 4


@glibc
def test_what_was_kept_can_be_given_back():
    code = """
from meme.support.memory import give_freed_memory_back, keep_freed_memory
keep_freed_memory()
small = [torch.ones(2**16) for _ in range(1024)]  # 256 MiB
last = torch.ones(2**16)  # above them: they do not lie at the end of the heap
del small
print(resident())
give_freed_memory_back()
print(resident())
"""
    kept, left = said(code)
    assert kept - left > 200 * 2**20
