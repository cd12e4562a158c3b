"""A headless Chromium, driven by its DevTools protocol over a websocket of the standard library's sockets."""

import base64
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
SECONDS = 60.0


def find_chromium():
    """The program, or None where it is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_browser(folder: Path):
    """A :class:`Tab` of a Chromium whose files are in a folder."""
    options = ['--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0', '--no-first-run']
    options += ['--disable-background-networking', '--disable-component-update', f'--user-data-dir={folder}']
    process = subprocess.Popen(
        [find_chromium(), *options, 'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = _port(folder / 'DevToolsActivePort', process)
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/json/list', timeout=SECONDS) as answer:
            (target,) = (one for one in json.load(answer) if one['type'] == 'page')
        tab = Tab(port, f'/devtools/page/{target["id"]}')
        try:
            yield tab
        finally:
            tab.socket.close()
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(file: Path, process) -> int:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(file.read_text().splitlines()[0])
        time.sleep(0.05)
    raise RuntimeError(f'Chromium did not begin: {process.poll()}.')


class Tab:
    """A tab: calls of the protocol, and the events that came meanwhile."""

    def __init__(self, port: int, path: str):
        self.socket = socket.create_connection(('127.0.0.1', port), SECONDS)
        self.received = b''
        self.number = 0
        self.events: list[dict] = []
        key = base64.b64encode(os.urandom(16)).decode()
        head = f'GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
        self.socket.sendall(f'{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n'.encode())
        while b'\r\n\r\n' not in self.received:
            self.received += self.socket.recv(4096)
        answer, self.received = self.received.split(b'\r\n\r\n', 1)
        assert b' 101 ' in answer, answer

    def call(self, method: str, **parameters):
        """Call a method of the protocol, and wait for what it gives."""
        self.number += 1
        data = json.dumps({'id': self.number, 'method': method, 'params': parameters}).encode()
        mask = os.urandom(4)
        size = len(data)
        head = struct.pack('!BB', 0x81, 0x80 | size) if size < 126 else struct.pack('!BBQ', 0x81, 0xFF, size)
        if 126 <= size < 1 << 16:
            head = struct.pack('!BBH', 0x81, 0xFE, size)
        self.socket.sendall(head + mask + bytes(one ^ mask[place % 4] for place, one in enumerate(data)))
        while True:
            message = json.loads(self._message())
            if message.get('id') == self.number:
                assert 'error' not in message, message
                return message['result']
            self.events.append(message)

    def wait_for(self, method: str) -> None:
        """Wait for an event that has not come before."""
        while not any(event['method'] == method for event in self.events):
            self.events.append(json.loads(self._message()))

    def open(self, file: Path, width: int = 1200, height: int = 900, dark: bool = False, media: str = '') -> None:
        """Show a file in a window of a size."""
        for domain in ('Page', 'Network', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')
        self.call(
            'Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.call('Emulation.setEmulatedMedia', media=media, features=[scheme])
        self.events.clear()
        self.call('Page.navigate', url=file.resolve().as_uri())
        self.wait_for('Page.loadEventFired')

    def evaluate(self, code: str):
        """The value of an expression of JavaScript."""
        result = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def press(self, key: str, code: int) -> None:
        """Press a key, and let it go."""
        for kind in ('keyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, file: Path) -> None:
        """Write all of the page as PNG."""
        data = self.call('Page.captureScreenshot', captureBeyondViewport=True)['data']
        file.write_bytes(base64.b64decode(data))

    def _message(self) -> bytes:
        """The next message, whole."""
        parts = []
        while True:
            first, second = self._take(2)
            size = second & 0x7F
            if size > 125:
                size = int.from_bytes(self._take(2 if size == 126 else 8), 'big')
            data = self._take(size)
            if first & 0x0F in (0, 1, 2):
                parts.append(data)
                if first & 0x80:
                    return b''.join(parts)
            elif first & 0x0F == 8:
                raise ConnectionError('Chromium has closed the tab.')

    def _take(self, count: int) -> bytes:
        while len(self.received) < count:
            more = self.socket.recv(1 << 16)
            if not more:
                raise ConnectionError('Chromium has ended.')
            self.received += more
        taken, self.received = self.received[:count], self.received[count:]
        return taken
