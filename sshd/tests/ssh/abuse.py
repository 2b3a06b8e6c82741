"""What no client sends: one connection for each kind, logged in, then a few messages of our own making.

Prints for each what became of the connection: `NAME ended` or `NAME open`. With ROUNDS, only noise: as many
connections, each with a seed of its own, from SEED on.
usage: abuse.py PORT USER KEY [SEED [ROUNDS]]
"""

import random
import socket
import struct
import sys
import time

import paramiko

PORT, USER, KEY = int(sys.argv[1]), sys.argv[2], sys.argv[3]
SEED = int(sys.argv[4]) if len(sys.argv) > 4 else 1
ROUNDS = int(sys.argv[5]) if len(sys.argv) > 5 else 0

# RFC 4250, 4.1.2
DISCONNECT, IGNORE, SERVICE_REQUEST, SERVICE_ACCEPT, KEXINIT, NEWKEYS = 1, 2, 5, 6, 20, 21
USERAUTH_REQUEST, USERAUTH_SUCCESS, GLOBAL_REQUEST = 50, 52, 80
OPEN, OPEN_CONFIRMATION, OPEN_FAILURE, WINDOW_ADJUST, DATA, EXTENDED_DATA = 90, 91, 92, 93, 94, 95
EOF, CLOSE, REQUEST, SUCCESS, FAILURE = 96, 97, 98, 99, 100


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack(">I", len(value)) + value


def number(value):
    return struct.pack(">I", value)


class Client:
    def __init__(self):
        self.transport = paramiko.Transport(socket.create_connection(("127.0.0.1", PORT), 20))
        self.transport.start_client(timeout=20)
        self.transport.auth_publickey(USER, paramiko.Ed25519Key.from_private_key_file(KEY))

    def send(self, kind, *parts):
        message = paramiko.Message()
        message.add_bytes(bytes([kind]) + b"".join(parts))
        self.transport._send_message(message)

    def raw(self, data):
        self.transport.sock.sendall(data)

    def session(self, command=None):
        channel = self.transport.open_session(timeout=20)
        if command:
            channel.exec_command(command)
        return channel

    def became(self):
        """A connection that goes on answers a request."""
        if not self.transport.is_active():
            return "ended"
        try:
            self.transport.open_session(timeout=10).close()
            return "open"
        except Exception:
            return "ended"

    def close(self):
        self.transport.close()


def nobodys_channel(c):
    for kind, rest in [(DATA, text("x")), (EOF, b""), (CLOSE, b""), (WINDOW_ADJUST, number(9)),
                       (REQUEST, text("exec") + b"\1" + text("true")), (SUCCESS, b"")]:
        c.send(kind, number(4711), rest)


def more_than_the_window(c):
    channel = c.session("sleep 5")
    for _ in range(400):
        c.send(DATA, number(channel.remote_chanid), text(b"x" * 30000))


def a_packet_too_long(c):
    channel = c.session("cat")
    c.send(DATA, number(channel.remote_chanid), text(b"x" * 300_000))


def a_string_longer_than_its_message(c):
    channel = c.session()
    c.send(REQUEST, number(channel.remote_chanid), number(0xFFFFFFFF), b"exec")


def a_message_cut_short(c):
    channel = c.session()
    c.send(REQUEST, number(channel.remote_chanid), text("pty-req"), b"\1", text("xterm"), b"\0\0")


def requests_after_close(c):
    channel = c.session()
    there = number(channel.remote_chanid)
    c.send(CLOSE, there)
    for _ in range(3):
        c.send(REQUEST, there, text("exec"), b"\1", text("echo after"))
        c.send(DATA, there, text("after"))
        c.send(CLOSE, there)


def data_after_eof(c):
    channel = c.session("cat")
    there = number(channel.remote_chanid)
    c.send(EOF, there)
    for _ in range(3):
        c.send(DATA, there, text("after"))
        c.send(EOF, there)


def a_window_of_everything(c):
    channel = c.session("cat")
    for _ in range(4):
        c.send(WINDOW_ADJUST, number(channel.remote_chanid), number(0xFFFFFFFF))


def another_login(c):
    c.send(SERVICE_REQUEST, text("ssh-userauth"))
    c.send(USERAUTH_REQUEST, text("root"), text("ssh-connection"), text("none"))


def answers_to_nothing(c):
    c.send(SERVICE_ACCEPT, text("ssh-userauth"))
    c.send(USERAUTH_SUCCESS)
    c.send(OPEN_CONFIRMATION, number(0), number(0), number(1), number(1))


def keys_out_of_turn(c):
    c.send(NEWKEYS)


def an_empty_key_exchange(c):
    c.send(KEXINIT, b"\0" * 16, *[text("")] * 10, b"\0", number(0))


def a_key_exchange_cut_short(c):
    c.send(KEXINIT, b"\0" * 16, number(0x7FFFFFFF))


def numbers_nobody_knows(c):
    for kind in (0, 7, 19, 49, 79, 127, 192, 255):
        c.send(kind, b"x" * 100)


def channels_of_odd_kinds(c):
    for kind in ("", "x" * 20_000, "session\0", "x11", "\xff", "direct-tcpip"):
        c.send(OPEN, text(kind), number(7), number(0), number(0), b"\0" * 8)


def requests_without_end(c):
    """Nobody reads the answers."""
    for _ in range(5_000):
        c.send(GLOBAL_REQUEST, text("nothing@example.org"), b"\1", b"x" * 200)


def channels_without_end(c):
    for n in range(5_000):
        c.send(OPEN, text("session"), number(n), number(0), number(0))


def environment_without_end(c):
    channel = c.session()
    for n in range(300):
        value = text("LC_%d" % n) + text("x" * 20_000)
        c.send(REQUEST, number(channel.remote_chanid), text("env"), b"\0", value)


def a_packet_of_noise(c):
    c.raw(bytes(range(256)) * 64)


def noise_in_messages(c, seed=SEED):
    """What looks like SSH, more or less, with channels that exist and such that don't."""
    chance = random.Random(seed)
    channels = [c.session(chance.choice(["cat", "yes", "sleep 9", None])) for _ in range(2)]
    kinds = [OPEN, OPEN_CONFIRMATION, OPEN_FAILURE, DATA, EXTENDED_DATA, REQUEST, REQUEST, WINDOW_ADJUST,
             GLOBAL_REQUEST, EOF, CLOSE, SUCCESS, FAILURE, IGNORE, 255]
    names = [b"exec", b"shell", b"pty-req", b"env", b"signal", b"window-change", b"subsystem", b"sftp",
             b"tcpip-forward", b"cancel-tcpip-forward", b"streamlocal-forward@openssh.com",
             b"auth-agent-req@openssh.com", b"direct-tcpip", b"direct-streamlocal@openssh.com", b"session",
             b"x11-req", b"eow@openssh.com", b"\0\xff\x1b"]
    for _ in range(chance.randrange(300)):
        parts = []
        # Most messages begin with a channel.
        if chance.random() < 0.7:
            parts.append(number(chance.choice(channels).remote_chanid))
        for _ in range(chance.randrange(6)):
            parts.append(chance.choice([
                lambda: number(chance.choice([0, 1, 22, 80, 4096, 0x7FFFFFFF, 0xFFFFFFFF])),
                lambda: number(chance.getrandbits(32)),
                lambda: text(chance.choice(names)),
                lambda: text(chance.randbytes(chance.randrange(2000))),
                lambda: chance.randbytes(chance.randrange(64)),
                lambda: bytes([chance.getrandbits(1)]),
            ])())
        c.send(chance.choice(kinds), *parts)


ABUSES = [nobodys_channel, more_than_the_window, a_packet_too_long, a_string_longer_than_its_message,
          a_message_cut_short, requests_after_close, data_after_eof, a_window_of_everything,
          another_login, answers_to_nothing, keys_out_of_turn, an_empty_key_exchange,
          a_key_exchange_cut_short, numbers_nobody_knows, channels_of_odd_kinds,
          requests_without_end, channels_without_end, environment_without_end, a_packet_of_noise,
          noise_in_messages]

def run(name, abuse):
    client = Client()
    try:
        abuse(client)
    except Exception:
        pass  # It was cut off in the middle.
    time.sleep(0.05)
    print(name, client.became(), flush=True)
    client.close()


if ROUNDS:
    for seed in range(SEED, SEED + ROUNDS):
        run("noise %d" % seed, lambda c: noise_in_messages(c, seed))
else:
    for abuse in ABUSES:
        run(abuse.__name__, abuse)
