; The threads of a library, and how they share a parallel loop. See threads.py for what they are for.
;
; TVM cuts a loop into as many tasks as it is told and calls `launch` with a function that runs one of them. Every
; thread has a counter of tasks of its own; a thread takes its own first, in order (so that it meets the data that it
; wrote itself), then those of the others. The thread that launches works as well: where the system lets no other
; thread run, it does everything, and it waits for no more than tasks that have begun.
;
; $chunks   tasks per thread
; $spinning nanoseconds that a thread without work waits before it sleeps
; $patience nanoseconds that the launching thread waits for others before it sleeps
; $futex, $affinity_of, $set_affinity, $thread_id   numbers of system calls
; $word     an integer as wide as an address: C's long, and the parts of a time
; $pause    the processor's hint that a thread waits

; Where TVM's code looks for the function that shares its loops.
@__TVMBackendParallelLaunch = weak global ptr null
@before = internal global ptr null

; One cache line for each thread: the tasks that were taken of its own (a launch sets them to 0; at $chunks all are
; taken), then, in 32 bits each, whether it sleeps and the system's number of it.
@counters = internal global [1024 x [8 x i64]] zeroinitializer, align 64
; Tasks of the launch that are not finished.
@left = internal global i32 0, align 64
; Whether the launching thread sleeps until none is left.
@waiting = internal global i32 0, align 4
@busy = internal global i32 0, align 64
; How often it was started: a file that is loaded twice is one library.
@users = internal global i32 0, align 4
@stop = internal global i32 0, align 4
@count = internal global i32 1, align 4

; What a launch runs: the function, its data, and { -, number of tasks }. It stands while a task is unfinished.
@function = internal global ptr null, align 64
@data = internal global ptr null, align 8
@environment = internal global { ptr, i32 } zeroinitializer, align 8
@handles = internal global [1024 x $word] zeroinitializer, align 8

declare $word @syscall($word, ...)
declare i32 @clock_gettime(i32, ptr)
declare i32 @sched_getcpu()
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_join($word, ptr)
declare void @llvm.trap()
declare i32 @graphopt_worker($word)
declare i32 @graphopt_launch($word, $word, i32)

define void @graphopt_sleep_on(ptr %word, i32 %value) alwaysinline {
  %r = call $word ($word, ...) @syscall($word $futex, ptr %word, i32 128, i32 %value, ptr null)
  ret void
}

define void @graphopt_wake(ptr %word) alwaysinline {
  %r = call $word ($word, ...) @syscall($word $futex, ptr %word, i32 129, i32 2147483647)
  ret void
}

define ptr @graphopt_sleeps(i32 %who) alwaysinline {
  %sleeps = getelementptr [8 x i64], ptr @counters, i32 %who, i32 1
  ret ptr %sleeps
}

; Wake a thread if it sleeps, on another processor than this one. Linux puts a thread that it wakes beside the one that
; woke it when it takes the other processors to be busy, as it does in a virtual machine whose idle processors the host
; has taken away; there the two get in each other's way for milliseconds. So this processor is forbidden to the sleeper
; while it is woken, and allowed again at once. Where it is the only one allowed the system refuses, and nothing changes.
define internal void @graphopt_rouse(i32 %who) noinline {
entry:
  %mask = alloca [128 x i8], align 8
  %sleeps = call ptr @graphopt_sleeps(i32 %who)
  %slept = atomicrmw xchg ptr %sleeps, i32 0 seq_cst
  %awake = icmp eq i32 %slept, 0
  br i1 %awake, label %end, label %ask
ask:
  %id_at = getelementptr i32, ptr %sleeps, i32 1
  %id = load i32, ptr %id_at
  %here = call i32 @sched_getcpu()
  %bytes = call $word ($word, ...) @syscall($word $affinity_of, i32 %id, $word 128, ptr %mask)
  %bytes_at = inttoptr $word %bytes to ptr
  %size = ptrtoint ptr %bytes_at to i32
  %at = lshr i32 %here, 3
  %known = icmp slt i32 %at, %size
  br i1 %known, label %forbid, label %wake
forbid:
  %byte_at = getelementptr i8, ptr %mask, i32 %at
  %byte = load i8, ptr %byte_at
  %low = trunc i32 %here to i8
  %place = and i8 %low, 7
  %bit = shl i8 1, %place
  %others = xor i8 %bit, -1
  %rest = and i8 %byte, %others
  store i8 %rest, ptr %byte_at
  %refused = call $word ($word, ...) @syscall($word $set_affinity, i32 %id, $word %bytes, ptr %mask)
  store i8 %byte, ptr %byte_at
  br label %wake
wake:
  %changed = phi $word [ -1, %ask ], [ %refused, %forbid ]
  call void @graphopt_wake(ptr %sleeps)
  %as_before = icmp ne $word %changed, 0
  br i1 %as_before, label %end, label %allow
allow:
  %r = call $word ($word, ...) @syscall($word $set_affinity, i32 %id, $word %bytes, ptr %mask)
  br label %end
end:
  ret void
}

; Nanoseconds on a clock that only goes on. The processor's hint takes between 2 and 50 of them, so that rounds of
; waiting tell nothing.
define i64 @graphopt_now() alwaysinline {
  %time = alloca { $word, $word }
  %code = call i32 @clock_gettime(i32 1, ptr %time)
  %seconds_word = load $word, ptr %time
  %rest_at = getelementptr { $word, $word }, ptr %time, i32 0, i32 1
  %rest_word = load $word, ptr %rest_at
  ; By way of a pointer a word of 32 bits becomes one of 64, and one of 64 stays as it is.
  %seconds_wide = inttoptr $word %seconds_word to ptr
  %rest_wide = inttoptr $word %rest_word to ptr
  %seconds = ptrtoint ptr %seconds_wide to i64
  %rest = ptrtoint ptr %rest_wide to i64
  %whole = mul i64 %seconds, 1000000000
  %now = add i64 %whole, %rest
  ret i64 %now
}

; Wait a moment, and tell whether the waiting that began at %since has lasted %limit.
define i1 @graphopt_waited(i64 %since, i64 %limit) alwaysinline {
  call void asm sideeffect "$pause", ""()
  %now = call i64 @graphopt_now()
  %passed = sub i64 %now, %since
  %enough = icmp uge i64 %passed, %limit
  ret i1 %enough
}

; A task has no way to fail but for want of memory.
define void @graphopt_checked(ptr %function, i32 %task, ptr %environment, ptr %data) alwaysinline {
  %code = call i32 %function(i32 %task, ptr %environment, ptr %data)
  %bad = icmp ne i32 %code, 0
  br i1 %bad, label %fail, label %end
fail:
  call void @llvm.trap()
  unreachable
end:
  ret void
}

define void @graphopt_run(i32 %task) alwaysinline {
  %function = load ptr, ptr @function
  %data = load ptr, ptr @data
  call void @graphopt_checked(ptr %function, i32 %task, ptr @environment, ptr %data)
  %left = atomicrmw sub ptr @left, i32 1 seq_cst
  %last = icmp eq i32 %left, 1
  br i1 %last, label %tell, label %end
tell:
  %waiting = load atomic i32, ptr @waiting seq_cst, align 4
  %asleep = icmp ne i32 %waiting, 0
  br i1 %asleep, label %rouse, label %end
rouse:
  call void @graphopt_wake(ptr @left)
  br label %end
end:
  ret void
}

; Run tasks until all are taken, those of thread %me first.
define void @graphopt_work(i32 %me) alwaysinline {
entry:
  %count = load i32, ptr @count
  br label %next
next:
  %step = phi i32 [ 0, %entry ], [ %further, %empty ]
  %sum = add i32 %me, %step
  %who = urem i32 %sum, %count
  %counter = getelementptr [8 x i64], ptr @counters, i32 %who
  br label %look
look:
  %seen = load atomic i64, ptr %counter acquire, align 8
  %maybe = icmp ult i64 %seen, $chunks
  br i1 %maybe, label %claim, label %empty
claim:
  ; A launch may have ended and another begun since the look: what is claimed is the other's then, and as good.
  %number = atomicrmw add ptr %counter, i64 1 acq_rel
  %mine = icmp ult i64 %number, $chunks
  br i1 %mine, label %take, label %empty
take:
  %first = mul i32 %who, $chunks
  %short = trunc i64 %number to i32
  %task = add i32 %first, %short
  call void @graphopt_run(i32 %task)
  br label %look
empty:
  %further = add i32 %step, 1
  %more = icmp ult i32 %further, %count
  br i1 %more, label %next, label %end
end:
  ret void
}

define i32 @graphopt_worker_body($word %argument) alwaysinline {
entry:
  %argument_at = inttoptr $word %argument to ptr
  %me = ptrtoint ptr %argument_at to i32
  %counter = getelementptr [8 x i64], ptr @counters, i32 %me
  %sleeps = call ptr @graphopt_sleeps(i32 %me)
  %id_at = getelementptr i32, ptr %sleeps, i32 1
  %id_word = call $word ($word, ...) @syscall($word $thread_id)
  %id_pointer = inttoptr $word %id_word to ptr
  %id = ptrtoint ptr %id_pointer to i32
  store i32 %id, ptr %id_at
  br label %begin
begin:
  %since = call i64 @graphopt_now()
  br label %look
look:
  %seen = load atomic i64, ptr %counter acquire, align 8
  %some = icmp ult i64 %seen, $chunks
  br i1 %some, label %do, label %idle
do:
  call void @graphopt_work(i32 %me)
  br label %begin
idle:
  %tired = call i1 @graphopt_waited(i64 %since, i64 $spinning)
  br i1 %tired, label %sleep, label %look
sleep:
  ; Either the launch sees that this thread sleeps, or this thread sees the launch in its counter.
  store atomic i32 1, ptr %sleeps seq_cst, align 4
  %stop = load atomic i32, ptr @stop seq_cst, align 4
  %stopped = icmp ne i32 %stop, 0
  br i1 %stopped, label %end, label %again
again:
  %now = load atomic i64, ptr %counter seq_cst, align 8
  %come = icmp ult i64 %now, $chunks
  br i1 %come, label %awake, label %lie
lie:
  call void @graphopt_sleep_on(ptr %sleeps, i32 1)
  br label %awake
awake:
  store atomic i32 0, ptr %sleeps seq_cst, align 4
  br label %begin
end:
  store atomic i32 0, ptr %sleeps seq_cst, align 4
  ret i32 0
}

define void @graphopt_alone(ptr %function, ptr %data) alwaysinline {
  %environment = alloca { ptr, i32 }
  store { ptr, i32 } { ptr null, i32 1 }, ptr %environment
  call void @graphopt_checked(ptr %function, i32 0, ptr %environment, ptr %data)
  ret void
}

define i32 @graphopt_launch_body($word %function_at, $word %data_at, i32 %tasks) alwaysinline {
entry:
  %function = inttoptr $word %function_at to ptr
  %data = inttoptr $word %data_at to ptr
  %taken = cmpxchg ptr @busy, i32 0, i32 1 acq_rel monotonic
  %free = extractvalue { i32, i1 } %taken, 1
  br i1 %free, label %together, label %single
single:
  ; Another thread of the user's is within this library, or this is a loop within a loop.
  call void @graphopt_alone(ptr %function, ptr %data)
  ret i32 0
together:
  store ptr %function, ptr @function
  store ptr %data, ptr @data
  %count = load i32, ptr @count
  %all = mul i32 %count, $chunks
  store atomic i32 %all, ptr @left seq_cst, align 4
  br label %open
open:
  %who = phi i32 [ 0, %together ], [ %next, %open ]
  %counter = getelementptr [8 x i64], ptr @counters, i32 %who
  store atomic i64 0, ptr %counter seq_cst, align 8
  %next = add i32 %who, 1
  %more = icmp ult i32 %next, %count
  br i1 %more, label %open, label %call
call:
  %sleeper = phi i32 [ 0, %open ], [ %other, %called ]
  %sleeps = call ptr @graphopt_sleeps(i32 %sleeper)
  %slept = load atomic i32, ptr %sleeps seq_cst, align 4
  %asleep = icmp ne i32 %slept, 0
  br i1 %asleep, label %rouse, label %called
rouse:
  call void @graphopt_rouse(i32 %sleeper)
  br label %called
called:
  %other = add i32 %sleeper, 1
  %last = icmp ult i32 %other, %count
  br i1 %last, label %call, label %help
help:
  call void @graphopt_work(i32 0)
  %since = call i64 @graphopt_now()
  br label %look
look:
  %left = load atomic i32, ptr @left acquire, align 4
  %done = icmp eq i32 %left, 0
  br i1 %done, label %end, label %still
still:
  %tired = call i1 @graphopt_waited(i64 %since, i64 $patience)
  br i1 %tired, label %sleep, label %look
sleep:
  ; The processor that this thread leaves is free for the one that has the last task.
  store atomic i32 1, ptr @waiting seq_cst, align 4
  br label %check
check:
  %rest = load atomic i32, ptr @left seq_cst, align 4
  %none = icmp eq i32 %rest, 0
  br i1 %none, label %woken, label %lie
lie:
  call void @graphopt_sleep_on(ptr @left, i32 %rest)
  br label %check
woken:
  store atomic i32 0, ptr @waiting seq_cst, align 4
  br label %end
end:
  store atomic i32 0, ptr @busy release, align 4
  ret i32 0
}

define i32 @graphopt_start_body(i32 %count) alwaysinline {
entry:
  %users = load i32, ptr @users
  %now = add i32 %users, 1
  store i32 %now, ptr @users
  %others = icmp ne i32 %users, 0
  br i1 %others, label %started, label %begin
started:
  ret i32 0
begin:
  %before = load ptr, ptr @__TVMBackendParallelLaunch
  store ptr %before, ptr @before
  store i32 %count, ptr @count
  %all = mul i32 %count, $chunks
  store i32 %all, ptr getelementptr ({ ptr, i32 }, ptr @environment, i32 0, i32 1)
  store atomic i32 0, ptr @stop seq_cst, align 4
  br label %close
close:
  %i = phi i32 [ 0, %begin ], [ %following, %close ]
  %counter = getelementptr [8 x i64], ptr @counters, i32 %i
  store atomic i64 $chunks, ptr %counter seq_cst, align 8
  %following = add i32 %i, 1
  %again = icmp ult i32 %following, %count
  br i1 %again, label %close, label %first
first:
  %any = icmp ugt i32 %count, 1
  br i1 %any, label %create, label %end
create:
  %n = phi i32 [ 1, %first ], [ %next, %created ]
  %handle = getelementptr $word, ptr @handles, i32 %n
  %argument = inttoptr i32 %n to ptr
  %code = call i32 @pthread_create(ptr %handle, ptr null, ptr @graphopt_worker, ptr %argument)
  ; Without this thread (the system gives no more) the others do its work.
  %bad = icmp ne i32 %code, 0
  br i1 %bad, label %none, label %created
none:
  store $word 0, ptr %handle
  br label %created
created:
  %next = add i32 %n, 1
  %more = icmp ult i32 %next, %count
  br i1 %more, label %create, label %end
end:
  store ptr @graphopt_launch, ptr @__TVMBackendParallelLaunch
  ret i32 0
}

define i32 @graphopt_finish_body() alwaysinline {
entry:
  %users = load i32, ptr @users
  %now = sub i32 %users, 1
  store i32 %now, ptr @users
  %others = icmp ne i32 %now, 0
  br i1 %others, label %needed, label %begin
needed:
  ret i32 0
begin:
  store atomic i32 1, ptr @stop seq_cst, align 4
  %count = load i32, ptr @count
  %any = icmp ugt i32 %count, 1
  br i1 %any, label %join, label %end
join:
  %n = phi i32 [ 1, %begin ], [ %next, %joined ]
  %slot = getelementptr $word, ptr @handles, i32 %n
  %handle = load $word, ptr %slot
  %none = icmp eq $word %handle, 0
  br i1 %none, label %joined, label %wait
wait:
  call void @graphopt_rouse(i32 %n)
  %code = call i32 @pthread_join($word %handle, ptr null)
  br label %joined
joined:
  %next = add i32 %n, 1
  %more = icmp ult i32 %next, %count
  br i1 %more, label %join, label %end
end:
  %before = load ptr, ptr @before
  store ptr %before, ptr @__TVMBackendParallelLaunch
  ret i32 0
}
