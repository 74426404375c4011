"""A page in headless Chromium, over the DevTools protocol on two pipes.

What it requests, what its console says, how wide it is, what it looks like.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
TIMEOUT = 60
# the browser reads from descriptor 3 and writes to 4
LAUNCH = '''
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
'''


def find():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page; close it."""

    def __init__(self, profile):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, '-c', LAUNCH, str(to_browser), str(from_browser),
             find(), '--headless=new', '--no-sandbox', '--disable-gpu',
             '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-dev-shm-usage',
             f'--user-data-dir={profile}', '--remote-debugging-pipe',
             'about:blank'],
            pass_fds=[to_browser, from_browser], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._count, self._buffer, self.events = 0, b'', []
        self._session = None
        target = self.call('Target.createTarget', url='about:blank')
        self._session = self.call(
            'Target.attachToTarget', targetId=target['targetId'],
            flatten=True)['sessionId']
        for domain in 'Page', 'Runtime', 'Log', 'Network':
            self.call(f'{domain}.enable')

    def call(self, method, **params):
        """The result of a command; events that come meanwhile are kept."""
        self._count += 1
        message = {'id': self._count, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._out, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self._count:
                assert 'error' not in answer, answer['error']
                return answer['result']
            self.events.append(answer)

    def _next(self):
        end = time.monotonic() + TIMEOUT
        while b'\0' not in self._buffer:
            ready, _, _ = select.select([self._in], [], [],
                                        max(0, end - time.monotonic()))
            assert ready, 'the browser is silent'
            part = os.read(self._in, 1 << 20)
            assert part, 'the browser has gone'
            self._buffer += part
        line, self._buffer = self._buffer.split(b'\0', 1)
        return json.loads(line)

    def open(self, url, width, height=900, dark=False, phone=False):
        """Load a page anew; returns once it is loaded."""
        self.call('Emulation.setDeviceMetricsOverride', width=width,
                  height=height, deviceScaleFactor=1, mobile=phone)
        self.call('Emulation.setEmulatedMedia', features=[
            {'name': 'prefers-color-scheme',
             'value': 'dark' if dark else 'light'}])
        self.events.clear()
        self.call('Page.navigate', url=url)
        while not self.named('Page.loadEventFired'):
            self.events.append(self._next())

    def named(self, *methods):
        return [e['params'] for e in self.events if e.get('method') in methods]

    def requests(self):
        return [e['request']['url']
                for e in self.named('Network.requestWillBeSent')]

    def complaints(self):
        """What the console shows, errors and warnings of any kind."""
        return self.named('Runtime.exceptionThrown',
                          'Runtime.consoleAPICalled', 'Log.entryAdded')

    def value(self, expression):
        return self.call('Runtime.evaluate', expression=expression,
                         returnByValue=True)['result']['value']

    def screenshot(self, path, whole=False):
        data = self.call('Page.captureScreenshot',
                         captureBeyondViewport=whole)['data']
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self._session = None
        self.call('Browser.close')
        self._process.wait(TIMEOUT)
        os.close(self._in)
        os.close(self._out)
