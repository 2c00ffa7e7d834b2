"""The process that runs generated code: it locks itself up, then runs the program it was given.

A script of its own, `python -I sandbox_child.py JOB REPORT FOLDER`, with the standard library
alone. JOB and REPORT are file descriptors: the job is JSON, the report a few lines of text. In
order: namespaces (user, network, mounts, processes, IPC), a read-only file system with a small one
in memory at FOLDER, limits, no capabilities, a filter of system calls. If one of them cannot be
had, the report says why and nothing runs.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys

NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x00020000 | 0x20000000 | 0x08000000
"""CLONE_NEWUSER, NEWNET, NEWNS, NEWPID, NEWIPC."""
PRIVATE = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE
NOTHING_SPECIAL = 0x2 | 0x4 | 0x8  # MS_NOSUID | MS_NODEV | MS_NOEXEC
READ_ONLY = 0x1
MOUNT_SETATTR, RECURSIVE, HERE = 442, 0x8000, -100
NO_NEW_PRIVILEGES, DIE_WITH_PARENT, SECCOMP, FILTER = 38, 1, 22, 2
CLONE_THREAD = 0x10000
CAPABILITIES_3 = 0x20080522
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, ALLOW, NO_SUCH_CALL = 0x80000000, 0x7FFF0000, 0x00050026
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
OTHER_ABI = 0x40000000
"""Of x86-64: the first number of its 32-bit calls."""
COMMON = (425, 428, 429, 430, 442)
"""io_uring_setup, open_tree, move_mount, fsopen, mount_setattr: the same number everywhere."""
CALLS = {
    # the architecture's own number, clone, and: (v)fork, execve(at), socket, ptrace, (u)mount,
    # unshare, setns, bpf, perf_event_open, process_vm_*, memfd_create, shmget, keyctl,
    # userfaultfd, chroot, pivot_root
    "x86_64": (
        *(0xC000003E, 56),
        (57, 58, 59, 322, 41, 101, 165, 166, 272, 308, 321, 298, 310, 311, 319, 29, 250, 323)
        + (161, 155),
    ),
    "aarch64": (
        *(0xC00000B7, 220),
        (221, 281, 198, 117, 40, 39, 97, 268, 280, 241, 270, 271, 279, 194, 219, 282, 51, 41),
    ),
}
CLONE3 = 435
SHOWN = 300
"""Characters of an error that are reported."""


class Refused(Exception):
    """The process cannot be locked up here."""


libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, result: int) -> None:
    """Check the result of a function of libc."""
    if result != 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def enter_namespaces() -> None:
    """New namespaces for this process, and for the processes that it starts."""
    user, group = os.getuid(), os.getgid()
    call("no namespaces", libc.unshare(NEW_NAMESPACES))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise Refused(f"no user namespace: {error.strerror}") from None


def close_file_system(folder: str, size: int) -> None:
    """Make every file read-only, hide /proc, and mount `size` bytes of memory at `folder`."""
    call("mounts stay shared", libc.mount(None, b"/", None, PRIVATE, None))
    closed = ctypes.create_string_buffer(struct.pack("QQQQ", READ_ONLY, 0, 0, 0))
    call(
        "the file system stays writable",
        libc.syscall(MOUNT_SETATTR, HERE, b"/", RECURSIVE, closed, 32),
    )
    for place, flags, options in (
        (folder, NOTHING_SPECIAL, f"size={size},nr_inodes=4096,mode=700"),
        ("/proc", NOTHING_SPECIAL | READ_ONLY, "size=4096"),
    ):
        mounted = libc.mount(b"none", os.fsencode(place), b"tmpfs", flags, options.encode())
        call(f"no file system in memory at {place}", mounted)
    os.chdir(folder)


def limit(job: dict) -> None:
    """Set the limits of the job: seconds of CPU, bytes of memory and of a file, open files."""
    for name, value in (
        (resource.RLIMIT_CPU, job["cpu"]),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_FSIZE, job["file"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error in the program instead


def drop_capabilities() -> None:
    """Give up what the owner of a user namespace may do in it."""
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITIES_3, 0))
    call("capabilities stay", libc.capset(header, ctypes.create_string_buffer(24)))
    call("privileges may come back", libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def filter_calls() -> None:
    """End the process at a system call that starts a process, opens a socket or undoes the rest."""
    machine = os.uname().machine
    if machine not in CALLS:
        raise Refused(f"no filter of system calls for {machine}")
    architecture, clone, forbidden = CALLS[machine]
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, OTHER_ABI),
        (RETURN, 0, 0, KILL),
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, NO_SUCH_CALL),  # so that threads are started by clone, whose flags we see
    ]
    for number in (*forbidden, *COMMON):
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, KILL)]
    program += [
        (EQUAL, 0, 3, clone),
        (LOAD, 0, 0, ARGUMENT),
        (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, KILL),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    call("no filter of system calls", libc.prctl(SECCOMP, FILTER, head, 0, 0))


def run(job: dict, report: int, folder: str) -> None:
    """Run the job's program in this process, and report how it ended; does not return."""
    try:
        call("no end with the parent", libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0))
        close_file_system(folder, job["space"])
        limit(job)
        drop_capabilities()
        filter_calls()
    except Refused as error:
        os.write(report, f"refused\n{error}".encode())
        os._exit(1)
    end = b"finished\n" + job["nonce"].encode()
    try:
        exec(compile(job["source"], "program.py", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        end = b"exit\n" + str(error.code).encode()[:SHOWN]
    except BaseException as error:
        end = b"error\n" + f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:SHOWN]
    try:
        sys.stdout.flush()
    except BaseException:
        end = b"error\nits output could not be written"
    os.write(report, end)
    os._exit(0)


def main() -> None:
    """Enter the namespaces, and let a child, the only process in them, run the program."""
    given, report, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with open(given, encoding="utf-8") as file:
        job = json.load(file)
    try:
        enter_namespaces()
    except Refused as error:
        os.write(report, f"refused\n{error}".encode())
        return
    child = os.fork()
    if child == 0:
        run(job, report, folder)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        os.write(report, b"signal\n" + signal.Signals(os.WTERMSIG(status)).name.encode())


if __name__ == "__main__":
    main()
