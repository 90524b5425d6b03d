"""Serves S3 out of memory on a free port of HOST, prints that port, and ends when standard input closes.

moto's conditional put looks whether the object is there and then writes it; in S3 that is one step. So requests are
handled one at a time here. Usage: s3_server.py BUCKET HOST
"""

import os
import sys
import threading
import urllib.request

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

turn = threading.Lock()
moto = DomainDispatcherApplication(create_backend_app)


def one_at_a_time(environ, start_response):
    with turn:
        return list(moto(environ, start_response))


class Silent(WSGIRequestHandler):
    def log_request(self, *_):
        pass


host = sys.argv[2]
server = make_server(host, 0, one_at_a_time, threaded=True, request_handler=Silent)
threading.Thread(target=server.serve_forever, daemon=True).start()
bucket = urllib.request.Request(f"http://{host}:{server.port}/{sys.argv[1]}", method="PUT")
urllib.request.urlopen(bucket).close()
print(server.port, flush=True)
sys.stdin.read()
os._exit(0)
