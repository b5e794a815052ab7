"""Network namespaces and TUN devices by plain system calls: a fresh machine needs no iproute2 for it."""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
DEVICE = "tun0"
MTU = 65520
"""A message is few packets, so that a user-space forwarder keeps up."""

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8916, 0x891C, 0x8922

_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """Why this machine cannot make namespaces with a TUN device each; None = it can (tried in a thread that ends)."""
    if not hasattr(_libc, "setns"):
        return "network namespaces need Linux"
    problems: list[str] = []

    def attempt() -> None:
        try:
            unshare()
        except OSError as error:
            problems.append(f"no right to make a network namespace ({error}); run as root")
            return
        try:
            os.close(open_tun("10.0.0.1"))
        except OSError as error:
            problems.append(f"no TUN device ({error}); it needs /dev/net/tun and the kernel's CONFIG_TUN")

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return problems[0] if problems else None


def unshare() -> None:
    """Give the calling thread a new, empty network namespace; threads and processes it starts inherit it.

    Raises:
        OSError: no right to do so.
    """
    _check(_libc.unshare(CLONE_NEWNET), "unshare")


def enter(path: str) -> None:
    """Move the calling thread, and what it starts from here on, into the namespace that a file of /proc stands for.

    Raises:
        OSError: no such namespace, or no right to enter it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(descriptor, CLONE_NEWNET), "setns")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """`enter` for a while: sockets, processes and threads made meanwhile by this thread stay in the namespace."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(path)
        try:
            yield
        finally:
            _check(_libc.setns(home, CLONE_NEWNET), "setns")
    finally:
        os.close(home)


def open_tun(address: str) -> int:
    """In the caller's namespace: `lo` up, and a TUN device with this /24 address.

    There is no other route on purpose: looking up a name in the DNS fails at once, instead of after 10 s.

    Returns:
        A non-blocking descriptor: one read or write is one IP packet. The device ends when it is closed.

    Raises:
        OSError: the kernel refuses.
    """
    # A link's queue is long beside its delay: probes for a lost tail would repeat data that only waits. This file is
    # the caller's namespace's; in some containers it cannot be written, and counters are then a few per cent higher.
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/tcp_early_retrans", "w") as file:
        file.write("0")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, TUNSETIFF, _request(DEVICE, struct.pack("H", IFF_TUN | IFF_NO_PI)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, SIOCSIFMTU, _request(DEVICE, struct.pack("i", MTU)))
            fcntl.ioctl(control, SIOCSIFADDR, _request(DEVICE, _socket_address(address)))
            fcntl.ioctl(control, SIOCSIFNETMASK, _request(DEVICE, _socket_address("255.255.255.0")))
            for device in ("lo", DEVICE):
                (flags,) = struct.unpack_from("H", fcntl.ioctl(control, SIOCGIFFLAGS, _request(device)), 16)
                fcntl.ioctl(control, SIOCSIFFLAGS, _request(device, struct.pack("H", flags | IFF_UP)))
    except BaseException:
        os.close(tun)
        raise
    return tun


def identity(path: str) -> int:
    """The inode of a namespace: equal for all files of /proc that stand for it."""
    return os.stat(path).st_ino


def processes(namespaces: set[int]) -> list[int]:
    """Pids whose main thread is in one of these namespaces."""
    found = []
    for name in os.listdir("/proc"):
        # It may end meanwhile; one of another user is none of ours.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if name.isdigit() and identity(f"/proc/{name}/ns/net") in namespaces:
                found.append(int(name))
    return found


def kill_processes(namespaces: set[int], *, spare: set[int], timeout_s: float = 10.0) -> list[int]:
    """End whatever lives in these namespaces, however it was detached; returns the pids that are still there."""
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in processes(namespaces) if pid not in spare]) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return left


def _check(result: int, call: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")


def _request(device: str, data: bytes = b"") -> bytes:
    """`struct ifreq`: name, then a union."""
    return struct.pack("16s24s", device.encode(), data)


def _socket_address(address: str) -> bytes:
    """`struct sockaddr_in`."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
