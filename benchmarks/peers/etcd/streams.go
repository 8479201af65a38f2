package main

// Two transports in two processes, and messages over their streams: benchmarks/streams.py does the same with ours.
//
//	etcd lead --peer URL [--kind msgapp] [--size 128] [--seconds S] [--warmup S] [--lone N] [--cert FILE --ca FILE]
//	etcd follow [--cert FILE --ca FILE]
//
// Both print "listening PORT" first. follow reads the leader's URL from the first line of its stdin and ends when that
// does; each prints one JSON object in the end.
//
// The leader sends messages with consecutive indexes, in batches, and has at most a window of them unanswered; the
// follower answers every batch. MsgApps go by msgappv2; of the kind "message" they are heartbeats with a context.
// MsgVotes with an index of its own mark where a run begins and ends, at which both sides look at their CPU; then
// come --lone messages one at a time, which carry the moment of the offer.

import (
	"bufio"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

const (
	batch  = 256
	window = 2048
	// The index of a MsgVote: what begins or ends there.
	markHello, markBegin, markEnd, markLone = 0, 1, 2, 3
	lonePause                               = 2 * time.Millisecond
	patience                                = 30 * time.Second
)

// asEtcd is the rate at which a member's stream readers dial again (rafthttp/stream.go).
var asEtcd = rate.Every(100 * time.Millisecond)

// ends counts what comes to a node's handler.
type ends struct {
	http.Handler
	streams, posts atomic.Int64
}

func (e *ends) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/raft/stream/") {
		e.streams.Add(1)
	} else if r.Method == http.MethodPost {
		e.posts.Add(1)
	}
	e.Handler.ServeHTTP(w, r)
}

// processor is a Raft that hands everything to one function.
type processor struct{ process func(m *raftpb.Message) }

func (p *processor) Process(_ context.Context, m raftpb.Message) error { p.process(&m); return nil }
func (p *processor) IsIDRemoved(uint64) bool                           { return false }
func (p *processor) ReportUnreachable(uint64)                          {}
func (p *processor) ReportSnapshot(uint64, raft.SnapshotStatus)        {}

// leader counts what was answered.
type leader struct {
	acked atomic.Uint64
	acks  chan struct{} // one is there when acked has grown
	marks chan uint64
}

func (l *leader) process(m *raftpb.Message) {
	switch m.Type {
	case raftpb.MsgAppResp:
		l.acked.Store(m.Index)
		select {
		case l.acks <- struct{}{}:
		default:
		}
	case raftpb.MsgVoteResp:
		l.marks <- m.Index
	}
}

// build makes one message: as etcd's raft does, with a slice of its own for the entries.
func build(kind string, index uint64, data []byte) raftpb.Message {
	if kind == "message" {
		return raftpb.Message{
			Type: raftpb.MsgHeartbeat, To: uint64(peerID), From: uint64(memberID), Term: term,
			Commit: index, Context: data,
		}
	}
	return raftpb.Message{
		Type: raftpb.MsgApp, To: uint64(peerID), From: uint64(memberID), Term: term, LogTerm: term,
		Index: index - 1, Commit: index - 1,
		Entries: []raftpb.Entry{{Term: term, Index: index, Data: data}},
	}
}

func indexOf(m *raftpb.Message) (index uint64, data []byte, ok bool) {
	switch {
	case m.Type == raftpb.MsgHeartbeat:
		return m.Commit, m.Context, true
	case m.Type == raftpb.MsgApp && len(m.Entries) == 1:
		return m.Entries[0].Index, m.Entries[0].Data, true
	}
	return 0, nil, false
}

func lead(args []string) any {
	flags := flag.NewFlagSet("lead", flag.ExitOnError)
	peer := flags.String("peer", "", "where the follower is")
	kind := flags.String("kind", "msgapp", "the stream: msgapp or message")
	size := flags.Int("size", 128, "bytes in the one entry")
	seconds := flags.Float64("seconds", 1, "of the measured run")
	warmup := flags.Float64("warmup", 0.3, "seconds before it")
	lone := flags.Int("lone", 300, "messages sent one at a time afterwards")
	tls := tlsFlags(flags)
	check(flags.Parse(args))

	l := &leader{acks: make(chan struct{}, 1), marks: make(chan uint64, 16)}
	tr := newTransport(memberID, &processor{l.process}, tls(), asEtcd)
	handler := &ends{Handler: tr.Handler()}
	port := listen(handler, tls())
	tr.AddPeer(peerID, []string{*peer})
	fmt.Println("listening", port)

	mark := func(index uint64) {
		tr.Send([]raftpb.Message{{Type: raftpb.MsgVote, To: uint64(peerID), From: uint64(memberID), Term: term, Index: index}})
		select {
		case got := <-l.marks:
			if got != index {
				check(fmt.Errorf("mark %d was answered with %d", index, got))
			}
		case <-time.After(patience):
			check(fmt.Errorf("mark %d was not answered", index))
		}
	}
	data := make([]byte, *size)
	sent := uint64(0)
	run := func(seconds float64) {
		messages := make([]raftpb.Message, 0, batch)
		for deadline := time.Now().Add(time.Duration(seconds * 1e9)); time.Now().Before(deadline); {
			for ; sent+batch <= l.acked.Load()+window; messages = messages[:0] {
				for range batch {
					sent++
					messages = append(messages, build(*kind, sent, data))
				}
				tr.Send(messages)
			}
			select {
			case <-l.acks:
			case <-time.After(patience):
				check(fmt.Errorf("no answer: %d sent, %d answered", sent, l.acked.Load()))
			}
		}
		for deadline := time.Now().Add(patience); l.acked.Load() < sent; {
			select {
			case <-l.acks:
			case <-time.After(time.Until(deadline)):
				check(fmt.Errorf("%d sent, %d answered", sent, l.acked.Load()))
			}
		}
	}

	for deadline := time.Now().Add(patience); handler.streams.Load() < 2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			check(fmt.Errorf("the follower has dialled %d streams", handler.streams.Load()))
		}
	}
	time.Sleep(200 * time.Millisecond) // until they are attached, and our own as well
	mark(markHello)
	run(*warmup)
	runtime.GC()
	mark(markBegin)
	start, startCPU, startSent := time.Now(), cpuSeconds(), sent
	run(*seconds)
	took, tookCPU := time.Since(start).Seconds(), cpuSeconds()-startCPU
	mark(markEnd)
	messages := sent - startSent

	mark(markLone)
	for range *lone {
		time.Sleep(lonePause)
		sent++
		stamped := make([]byte, *size)
		binary.BigEndian.PutUint64(stamped, uint64(time.Now().UnixNano()))
		tr.Send([]raftpb.Message{build(*kind, sent, stamped)})
	}
	time.Sleep(lonePause)
	mark(markHello)
	tr.Stop()
	return map[string]any{
		"messages": messages, "seconds": took, "total": sent,
		"msgs_per_s":     float64(messages) / took,
		"cpu_us_per_msg": tookCPU * 1e6 / float64(messages),
	}
}

// follower answers, and measures itself between the marks. Process is called by one goroutine for each peer.
type follower struct {
	answer                   func(m raftpb.Message)
	posts                    *atomic.Int64
	received, last, unsorted uint64
	isLone                   bool
	lone                     []float64

	startCPU, tookCPU       float64
	startMessages, messages uint64
	startPosts, tookPosts   int64
}

func (f *follower) process(m *raftpb.Message) {
	if m.Type == raftpb.MsgVote {
		switch m.Index {
		case markBegin:
			f.startCPU, f.startMessages, f.startPosts = cpuSeconds(), f.received, f.posts.Load()
		case markEnd:
			f.tookCPU, f.messages = cpuSeconds()-f.startCPU, f.received-f.startMessages
			f.tookPosts = f.posts.Load() - f.startPosts
		case markLone:
			f.isLone = true
		}
		f.answer(raftpb.Message{Type: raftpb.MsgVoteResp, To: uint64(memberID), From: uint64(peerID), Term: term, Index: m.Index})
		return
	}
	index, data, ok := indexOf(m)
	if !ok {
		return
	}
	if f.isLone {
		f.lone = append(f.lone, float64(time.Now().UnixNano()-int64(binary.BigEndian.Uint64(data)))/1e3)
	}
	f.received++
	if index != f.last+1 {
		f.unsorted++
	}
	f.last = index
	if f.received%batch == 0 {
		f.answer(raftpb.Message{Type: raftpb.MsgAppResp, To: uint64(memberID), From: uint64(peerID), Term: term, Index: index})
	}
}

func follow(args []string) any {
	flags := flag.NewFlagSet("follow", flag.ExitOnError)
	tls := tlsFlags(flags)
	check(flags.Parse(args))

	f := &follower{}
	tr := newTransport(peerID, &processor{f.process}, tls(), asEtcd)
	f.answer = func(m raftpb.Message) { tr.Send([]raftpb.Message{m}) }
	handler := &ends{Handler: tr.Handler()}
	f.posts = &handler.posts
	port := listen(handler, tls())
	runtime.GC()
	fmt.Println("listening", port)
	stdin := bufio.NewReader(os.Stdin)
	url, err := stdin.ReadString('\n')
	check(err)
	tr.AddPeer(types.ID(memberID), []string{strings.TrimSpace(url)})
	_, err = io.Copy(io.Discard, stdin)
	check(err)
	tr.Stop()
	slices.Sort(f.lone)
	return map[string]any{
		"messages": f.messages, "total": f.received, "out_of_order": f.unsorted, "posts": f.tookPosts,
		"cpu_us_per_msg": f.tookCPU * 1e6 / float64(max(f.messages, 1)),
		"p50_us":         quantile(f.lone, 0.50),
		"p99_us":         quantile(f.lone, 0.99),
	}
}
