"""Serves S3 out of memory on a free port of HOST, prints that port, and ends when standard input closes.

moto's conditional put looks whether the object is there and then writes it; in S3 that is one step. So requests are
handled one at a time here. Usage: s3_server.py BUCKET HOST [SEED OF_THOUSAND DEADLINE FILE]

So many of a thousand requests, drawn from SEED, meet with trouble, each with a line in FILE: they are refused with 500 or 503,
answered late, done and answered with 500 all the same, or done once their client, which waits DEADLINE seconds, has given them up.
"""

import io
import os
import random
import sys
import threading
import time
import urllib.request

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

turn = threading.Lock()
moto = DomainDispatcherApplication(create_backend_app)


def one_at_a_time(environ, start_response):
    with turn:
        return list(moto(environ, start_response))


def refusal(status, code, start_response):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>trouble</Message></Error>".encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def troubled(seed, of_thousand, deadline, file):
    draws = random.Random(seed)

    def answer(environ, start_response):
        with turn:
            kind = draws.choice(["500", "503", "late", "lost", "stalled"]) if draws.randrange(1000) < of_thousand else None
            seconds = draws.uniform(0.1, 0.7) * deadline
            if kind:
                with open(file, "a") as told:
                    print(kind, file=told)
        # What was sent is read, or the client sees a broken connection, and one that gives up leaves half of it.
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        if kind == "late":
            time.sleep(seconds)
        if kind == "stalled":
            time.sleep(deadline + seconds)
        if kind in (None, "late", "stalled"):
            return one_at_a_time(environ, start_response)
        if kind == "lost":
            one_at_a_time(environ, lambda *_: None)
        if kind == "503":
            return refusal("503 Slow Down", "SlowDown", start_response)
        return refusal("500 Internal Server Error", "InternalError", start_response)

    return answer


class Silent(WSGIRequestHandler):
    def log_request(self, *_):
        pass


host = sys.argv[2]
ready = threading.Event()
disturbed = troubled(int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), sys.argv[6]) if len(sys.argv) > 3 else one_at_a_time


def application(environ, start_response):
    return (disturbed if ready.is_set() else one_at_a_time)(environ, start_response)


server = make_server(host, 0, application, threaded=True, request_handler=Silent)
threading.Thread(target=server.serve_forever, daemon=True).start()
bucket = urllib.request.Request(f"http://{host}:{server.port}/{sys.argv[1]}", method="PUT")
urllib.request.urlopen(bucket).close()
# The bucket is there: from now on there may be trouble.
ready.set()
print(server.port, flush=True)
sys.stdin.read()
os._exit(0)
