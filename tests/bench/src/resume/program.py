# Runs in a machine that is saved and resumed around it, and notices if it can. Answers each line that
# it reads with one that begins with "@@".
import hashlib, json, os, sys, termios, threading, time, zlib

MIB, PAGE = 1 << 20, 4096
pid, parent = os.getpid(), os.getppid()

# A child at the other end of two pipes.
there, here = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    with os.fdopen(there[0], "rb", 0) as lines, os.fdopen(here[1], "wb", 0) as answers:
        os.close(there[1])
        for line in lines:
            answers.write(line.upper())
    os._exit(0)
asks, answers = os.fdopen(there[1], "wb", 0), os.fdopen(here[0], "rb", 0)

mode = termios.tcgetattr(0)
mode[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, mode)

def pattern(n):
    return bytearray(hashlib.blake2b(str(n).encode()).digest() * (MIB // 64))

memory = [pattern(n) for n in range(int(sys.argv[1]))]
sums = [zlib.crc32(block) for block in memory]

# A file without a name, and files with names.
held = open(os.path.expanduser("~/held"), "w+b", 0)
os.unlink(held.name)
held_sum, files = hashlib.sha256(), {}

ticks, gap, last = 0, 0.0, time.monotonic()
chaos, steps, lock = 0.5, 0, threading.Lock()

def tick():
    global ticks, gap, last, chaos, steps
    while True:
        time.sleep(0.02)
        now = time.monotonic()
        gap, last, ticks = max(gap, now - last), now, ticks + 1
        with lock:
            for _ in range(10):
                chaos, steps = 3.7 * chaos * (1 - chaos), steps + 1

fired = []

def timer(seconds):
    due = time.monotonic() + seconds
    time.sleep(seconds)
    fired.append(time.monotonic() - due)

def work(n):
    for at in range(n % 7, len(memory), 7):
        block = memory[at]
        for page in range(n % 16, MIB // PAGE, 16):
            block[page * PAGE : page * PAGE + 64] = hashlib.blake2b(b"%d %d" % (n, page)).digest()
        block[(n % 256) * PAGE : (n % 256 + 1) * PAGE] = bytes(PAGE)
        sums[at] = zlib.crc32(block)
    piece = os.urandom(10000)
    held.write(piece)
    held_sum.update(piece)
    name = os.path.expanduser("~/work-%d" % (n % 20))
    with open(name, "wb") as file:
        file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    files[name] = hashlib.sha256(piece).hexdigest()

def check():
    wrong = []
    if any(zlib.crc32(block) != expected for block, expected in zip(memory, sums)):
        wrong.append("memory")
    held.seek(0)
    if hashlib.sha256(held.read()).digest() != held_sum.digest():
        wrong.append("the file without a name")
    for name, expected in files.items():
        with open(name, "rb") as file:
            if hashlib.sha256(file.read()).hexdigest() != expected:
                wrong.append(name)
    asks.write(b"are you there\n")
    if answers.readline() != b"ARE YOU THERE\n":
        wrong.append("the pipe")
    with lock:
        x = 0.5
        for _ in range(steps):
            x = 3.7 * x * (1 - x)
        if x != chaos:
            wrong.append("floating point")
    if (os.getpid(), os.getppid()) != (pid, parent) or os.waitpid(child, os.WNOHANG) != (0, 0):
        wrong.append("processes")
    return {"wrong": wrong, "pid": pid, "ticks": ticks, "gap": gap, "fired": fired,
            "monotonic": time.monotonic(), "wall": time.time(), "random": os.urandom(16).hex()}

threading.Thread(target=tick, daemon=True).start()
print("@@ ready", flush=True)
for line in sys.stdin:
    word, _, number = line.strip().partition(" ")
    if word == "work":
        work(int(number))
        print("@@ worked", flush=True)
    elif word == "timer":
        threading.Thread(target=timer, args=(float(number),), daemon=True).start()
        print("@@ waiting", flush=True)
    elif word == "check":
        print("@@ " + json.dumps(check()), flush=True)
