"""A client that does not wait for answers: over each of COUNT connections, all passwords at once.

Returns when the service has ended them.
usage: guesses.py PORT USER COUNT PASSWORD...
"""

import socket
import struct
import sys

import paramiko

PORT, USER, COUNT, PASSWORDS = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]

# RFC 4250, 4.1.2
SERVICE_REQUEST, USERAUTH_REQUEST = 5, 50


def text(value):
    return struct.pack(">I", len(value)) + value.encode()


def send(transport, kind, *parts):
    message = paramiko.Message()
    message.add_bytes(bytes([kind]) + b"".join(parts))
    transport._send_message(message)


transports = []
for _ in range(COUNT):
    transport = paramiko.Transport(socket.create_connection(("127.0.0.1", PORT), 20))
    transport.start_client(timeout=20)
    transports.append(transport)
    send(transport, SERVICE_REQUEST, text("ssh-userauth"))
    for password in PASSWORDS:
        parts = [text(USER), text("ssh-connection"), text("password"), b"\0", text(password)]
        send(transport, USERAUTH_REQUEST, *parts)
for transport in transports:
    transport.join(40)
