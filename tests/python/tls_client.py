"""Talks to a server over TLS: HTTPS and gRPC.

usage: tls_client.py HTTPS_URL GRPC_HOST:PORT CA_FILE CERT_FILE KEY_FILE

The server must want clients' certificates: without one, and with another authority, nobody is answered. Exits 0 and
prints one line when every check passed.
"""

import http.client
import pathlib
import ssl
import sys
import urllib.request

import grpc

HEALTH = "/grpc.health.v1.Health/Check"


def https(url, ca, identity):
    context = ssl.create_default_context(cafile=ca)
    if identity:
        context.load_cert_chain(*identity)
    with urllib.request.urlopen(f"{url}/v1/models", context=context, timeout=20) as reply:
        return reply.status, reply.read()


def rpc(address, ca, identity):
    read = lambda path: pathlib.Path(path).read_bytes()
    certificate, key = identity or (None, None)
    credentials = grpc.ssl_channel_credentials(read(ca), key and read(key), certificate and read(certificate))
    with grpc.secure_channel(address, credentials) as channel:
        # The empty message is the whole server; field 1 with value 1 is SERVING.
        return channel.unary_unary(HEALTH)(b"", timeout=20)


def refused(call, *errors):
    try:
        call()
    except errors:
        return
    raise AssertionError("a client without a certificate was answered")


def main():
    url, address, ca, certificate, key = sys.argv[1:]
    status, body = https(url, ca, (certificate, key))
    assert status == 200 and b"demo" in body, body
    assert rpc(address, ca, (certificate, key)) == b"\x08\x01"
    refused(lambda: https(url, ca, None), OSError, http.client.HTTPException)
    refused(lambda: https(url, None, (certificate, key)), OSError)
    refused(lambda: rpc(address, ca, None), grpc.RpcError)
    with grpc.insecure_channel(address) as channel:
        refused(lambda: channel.unary_unary(HEALTH)(b"", timeout=5), grpc.RpcError)
    print(f"TLS at {url} and {address}: every check passed")


if __name__ == "__main__":
    main()
