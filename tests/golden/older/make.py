#!/usr/bin/env python3
"""Makes what a host of an older version leaves when it dies: an SR, and what it had below /run.

    make.py <directory of the older executables> <directory for the files> [merge|relink|open]

The executables are those of the commit that the file `commit` beside them names; files `compose`, `importing` and `gc` there
say that they know of these. The last argument says what a worker that merges nodes is killed at. tests/tests/records reads
the files.
"""
import glob, hashlib, json, os, shutil, subprocess, sys, tempfile, time, uuid

build, out = sys.argv[1:3]
merging = (sys.argv[3:] or [None])[0]
# Short: sockets are below it.
place = tempfile.mkdtemp(prefix='o-', dir='/tmp')
root, sr_path, run = place + '/h', place + '/sr', place + '/h/run/xapi-storage-qcow2'
shutil.rmtree(out, ignore_errors=True)
for directory in (root + '/etc', sr_path, out + '/run'):
    os.makedirs(directory)
host = str(uuid.uuid4())
with open(root + '/etc/xensource-inventory', 'w') as file:
    file.write(f"INSTALLATION_UUID='{host}'\n")
gc = glob.glob(build + '/gc')
if gc:
    with open(root + '/etc/xapi-storage-qcow2.json', 'w') as file:
        file.write('{"gc": false}')
environment = dict(os.environ, XAPI_STORAGE_QCOW2_ROOT=root)
MIB = 1 << 20
contents = {}


def command(method):
    kind = 'datapath' if method.split('.')[0] in ('Datapath', 'Data') else 'volume'
    return [f'{build}/xapi-storage-qcow2-{kind}', method, '--json']


def request(method, fields):
    return json.dumps({'dbg': 'older', **({} if method.startswith(('Data', 'SR.create', 'SR.attach')) else {'sr': sr}), **fields})


def call(method, **fields):
    ran = subprocess.run(command(method), input=request(method, fields).encode(), capture_output=True, env=environment)
    if ran.returncode:
        raise SystemExit(f'{method} {fields}: {ran.stdout} {ran.stderr}')
    return json.loads(ran.stdout)


def killed(words, text, done):
    """Kills a call at each of its renames in turn, until what it leaves is what is looked for."""
    for when in range(1, 60):
        calls = 'rename,renameat,renameat2'
        strace = ['strace', '-f', '-qq', '-o', '/dev/null', '-e', f'trace={calls}', '-e', f'inject={calls}:signal=KILL:when={when}']
        subprocess.run(strace + words(), input=text(), capture_output=True, env=environment)
        if done():
            return
    raise SystemExit('never left in the middle')


def trees():
    found = {}
    for path in glob.glob(sr_path + '/trees/*/tree.json'):
        with open(path) as file:
            found[path] = json.load(file)
    return found


def tree(volume):
    return next(tree for tree in trees().values() if volume in tree['volumes'])


def uri(volume):
    return f'qsd://{sr}/{volume}'


def create(name):
    key = call('Volume.create', name=name, description='', size=MIB, sharable=False)['key']
    contents[key] = bytearray(MIB)
    return key


def opened(volume, domain='1'):
    call('Datapath.attach', uri=uri(volume), domain=domain)
    call('Datapath.activate', uri=uri(volume), domain=domain)


def closed(volume, domain='1'):
    call('Datapath.deactivate', uri=uri(volume), domain=domain)
    call('Datapath.detach', uri=uri(volume), domain=domain)


def socket(volume):
    return f'nbd+unix:///{volume}?socket={run}/volumes/{volume}/nbd.sock'


def write(volume, pattern, kib, length=64):
    subprocess.run(['qemu-io', '-f', 'raw', '-c', f'write -P {pattern} {kib}k {length}k', '-c', 'flush', socket(volume)], check=True, stdout=subprocess.DEVNULL)
    contents[volume][kib << 10:kib + length << 10] = bytes([pattern]) * (length << 10)


def snapshot(volume):
    key = call('Volume.snapshot', key=volume)['key']
    contents[key] = bytearray(contents[volume])
    return key


def destroy(volume):
    call('Volume.destroy', key=volume)
    del contents[volume]


def filled(name, pattern):
    volume = create(name)
    opened(volume)
    write(volume, pattern, 0)
    closed(volume)
    return volume


def hidden(name):
    """Makes a volume with a node below that no volume names."""
    volume = filled(name, 13)
    first, second = snapshot(volume), None
    opened(volume)
    write(volume, 14, 128)
    second = snapshot(volume)
    write(volume, 15, 256)
    destroy(first)
    destroy(second)
    return volume


sr = str(uuid.uuid4())
configuration = call('SR.create', uuid=sr, configuration={'uri': 'file://' + sr_path}, name='older', description='of an older version')
call('SR.attach', configuration=configuration)

disk = create('disk')
opened(disk)
write(disk, 1, 0, 128)
first = snapshot(disk)
write(disk, 2, 64, 128)
second = snapshot(disk)
write(disk, 3, 256)
closed(disk)
clone = call('Volume.clone', key=first)['key']
contents[clone] = bytearray(contents[first])
opened(clone)
write(clone, 4, 512)
closed(clone)
call('Volume.set', key=disk, k='a key', v='a value')
destroy(second)
named = {'disk': disk, 'snapshot': first, 'clone': clone, 'empty': create('empty')}

# A worker that is killed. Whatever is begun before it, it ends.
if merging:
    tried = []

    def prepared():
        for volume in tried:
            if merging == 'open':
                closed(volume)
            destroy(volume)
        tried[:] = [hidden('merged')]
        if merging != 'open':
            closed(tried[0])
        return [f'{build}/xapi-storage-qcow2-volume', 'gc', sr]

    def is_left():
        intents = [tree.get('intent', {}).get('relink') for tree in trees().values()]
        if merging == 'merge':
            return any('merge' in tree for tree in trees().values())
        return any(intent and bool(intent.get('open')) == (merging == 'open') for intent in intents)

    killed(prepared, bytes, is_left)
    named['merged'] = tried[0]

# Calls that are killed between their two commits.
resized = create('resized')
killed(lambda: command('Volume.resize'), lambda: request('Volume.resize', {'key': resized, 'new_size': 2 * MIB}).encode(), lambda: 'intent' in tree(resized))
contents[resized] = None

if glob.glob(build + '/compose'):
    lower, upper = filled('composed onto', 5), filled('composed', 6)
    call('Volume.compose', key=upper, key2=lower)
    contents[upper] = contents.pop(lower)
    contents[upper][:64 << 10] = bytes([6]) * (64 << 10)
    named['composed'] = upper
    lower, upper = filled('being composed onto', 5), filled('being composed', 6)
    killed(lambda: command('Volume.compose'), lambda: request('Volume.compose', {'key': upper, 'key2': lower}).encode(), lambda: any('compose' in tree.get('intent', {}) for tree in trees().values()))
    del contents[lower]
    named['being composed'] = upper
    tracked = create('tracked')
    call('Volume.enable_cbt', key=tracked)
    opened(tracked)
    write(tracked, 7, 0)
    gone = snapshot(tracked)
    write(tracked, 8, 128)
    closed(tracked)
    call('Volume.data_destroy', key=gone)
    contents[gone] = None
    named.update(tracked=tracked, destroyed=gone)
    thrown = create('thrown away')
    call('Datapath.open', uri=uri(thrown), persistent=False)
    opened(thrown)
    write(thrown, 9, 0)
    contents[thrown] = bytearray(MIB)
    named['thrown away'] = thrown

if glob.glob(build + '/importing'):
    imported = create('imported to')
    named['imported on'] = snapshot(imported)
    opened(imported, 'MIR1')
    call('Datapath.import_activate', uri=uri(imported), domain='MIR1')
    closed(imported, 'MIR1')
    named['importing'] = imported


# A guest's disk that is mirrored, an import, and a snapshot that was killed.
running, destination, target = create('running'), create('destination'), create('import target')
opened(running, '5')
write(running, 10, 0)
opened(destination, 'MIR2')
mirror = call('Data.mirror', uri=uri(running), domain='5', remote=socket(destination))
while not call('Data.stat', operation=mirror)['complete']:
    time.sleep(0.02)
contents[destination] = bytearray(contents[running])
opened(target, 'MIR3')
call('Datapath.import_activate', uri=uri(target), domain='MIR3')
switched = filled('switched', 11)
opened(switched, '6')
keys = set(contents)
killed(lambda: command('Volume.snapshot'), lambda: request('Volume.snapshot', {'key': switched}).encode(), lambda: 'switch' in tree(switched).get('intent', {}))
for volume in tree(switched)['volumes']:
    contents.setdefault(volume, bytearray(contents[switched]))
named.update(running=running, destination=destination, target=target, switched=switched, resized=resized)

for name, path in {
    'sr': f'srs/{sr}', 'running': f'volumes/{running}/state', 'destination': f'volumes/{destination}/state',
    'import': f'volumes/{target}/state', 'switched': f'volumes/{switched}/state', 'mirror': f'mirrors/{mirror[1]}/state',
    'gc': f'gc/{sr}', **({'thrown': f"volumes/{named['thrown away']}/state"} if 'thrown away' in named else {}),
}.items():
    if os.path.exists(f'{run}/{path}.json'):
        shutil.copy(f'{run}/{path}.json', f'{out}/run/{name}.json')
for session in glob.glob(run + '/sessions/*'):
    if os.path.isfile(session) and os.path.getsize(session):
        shutil.copy(session, f'{out}/run/session.json')

# The host dies.
mine = subprocess.run(['pgrep', '-f', place + '/'], capture_output=True).stdout.split()
for pid in mine:
    if int(pid) != os.getpid():
        os.kill(int(pid), 9)
time.sleep(0.5)
listed = {volume for tree in trees().values() for volume in tree['volumes']}
expected = {
    'commit': open(build + '/commit').read().strip(), 'host': host, 'sr': sr, 'mirror': mirror[1], 'named': named,
    'formats': sorted({tree['format'] for tree in trees().values()}),
    'intents': sorted({key for tree in trees().values() for key in tree.get('intent', {})} | {'merge' for tree in trees().values() if 'merge' in tree}),
    'contents': {key: content and hashlib.sha256(content).hexdigest() for key, content in sorted(contents.items()) if key in listed},
}
with open(out + '/expected.json', 'w') as file:
    json.dump(expected, file, indent=1)
    file.write('\n')
subprocess.run(f'tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 --sparse -C {place} -cf - sr | gzip -9n >{out}/sr.tar.gz', shell=True, check=True)
print(expected['formats'], expected['intents'], len(expected['contents']), 'volumes', os.path.getsize(out + '/sr.tar.gz'), 'bytes')
shutil.rmtree(place)
