package wire

import (
	"math"

	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
)

// maxType bounds the name of a type: no known one has half of it.
const maxType = 64

// DecodeClient reads a frame that a client sent. It accepts any bytes. A type
// that a client may not send, or that is not known, is an *Other; a CLIENT_OP is
// an *OpBatch.
func DecodeClient(frame []byte, lim Limits) (Message, error) {
	d := decoder{lim: lim}
	m, err := d.client(frame)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// decoder decodes one frame or body.
type decoder struct {
	reader
	lim     Limits
	deep    bool // some value may be nested too deeply
	foreign bool // some value may hold an extension that clients cannot read
	// clientNode is the last node id that checkNodeID accepted. The stamps of a frame
	// mostly have the same.
	clientNode string
}

// open begins to read data.
func (d *decoder) open(data []byte) *Error {
	r, shape, err := scan(data)
	d.reader, d.deep, d.foreign = r, shape.Depth > msgval.MaxDepth, shape.Foreign
	return err
}

// envelope is the outside of a frame.
type envelope struct {
	typ       []byte
	payload   reader // before the payload; zero without one
	timestamp reader // before the envelope's timestamp; zero without one
}

// openFrame reads the outside of a frame and leaves d where it began, before the
// fields of a flat frame.
func (d *decoder) openFrame(frame []byte) (env envelope, err *Error) {
	if err := d.open(frame); err != nil {
		return env, err
	}
	r := d.reader
	n, ok := r.mapHeader()
	if !ok {
		return env, badMessage("a frame must be a map")
	}
	for i := range n {
		key, ok := r.str()
		if !ok {
			return env, badMessage("the keys of a frame must be strings")
		}
		switch string(key) {
		case "type":
			if env.typ, ok = r.str(); !ok || len(env.typ) == 0 || len(env.typ) > maxType {
				return env, badMessage("type must be a string of 1 to 64 bytes")
			}
			continue
		case "payload":
			env.payload = r
		case "timestamp":
			env.timestamp = r
		}
		if i < n-1 { // what is last, mostly the payload, need not be looked through
			r.skip()
		}
	}
	if env.typ == nil {
		return env, badMessage("type is missing; want a string")
	}
	return env, nil
}

func (d *decoder) client(frame []byte) (Message, *Error) {
	env, err := d.openFrame(frame)
	if err != nil {
		return nil, err
	}
	switch string(env.typ) {
	case "AUTH":
		return d.auth()
	case "DEVICE_HELLO":
		return d.deviceHello()
	case "PING":
		return d.ping()
	case "SYNC_INIT":
		return d.syncInit()
	case "ORMAP_SYNC_INIT":
		return d.orMapSyncInit()
	case "MERKLE_REQ_BUCKET":
		return payload(d, env, d.merkleReqBucket)
	case "OP_BATCH":
		return markOps(payload(d, env, d.opBatch))
	case "CLIENT_OP":
		return markOps(payload(d, env, d.clientOp))
	case "QUERY_SUB":
		return payload(d, env, d.querySub)
	case "QUERY_UNSUB":
		return payload(d, env, d.queryUnsub)
	case "ORMAP_MERKLE_REQ_BUCKET":
		return payload(d, env, d.orMapMerkleReqBucket)
	case "ORMAP_PUSH_DIFF":
		return payload(d, env, d.orMapPushDiff)
	case "ORMAP_DIFF_REQUEST":
		return payload(d, env, d.orMapDiffRequest)
	case "CLIENT_APPLY_ACK":
		return d.clientApplyAck()
	case "TOPIC_SUB":
		m := new(TopicSub)
		return payload(d, env, func() (Message, *Error) { return m, d.topic(&m.Topic) })
	case "TOPIC_UNSUB":
		m := new(TopicUnsub)
		return payload(d, env, func() (Message, *Error) { return m, d.topic(&m.Topic) })
	case "TOPIC_PUB":
		return payload(d, env, d.topicPub)
	case "COUNTER_REQUEST":
		return payload(d, env, d.counterRequest)
	case "COUNTER_SYNC":
		return payload(d, env, d.counterSync)
	case "LOCK_REQUEST":
		return payload(d, env, d.lockRequest)
	case "LOCK_RELEASE":
		return payload(d, env, d.lockRelease)
	case "JOURNAL_READ":
		return d.journalRead()
	case "JOURNAL_SUBSCRIBE":
		return d.journalSubscribe()
	case "JOURNAL_UNSUBSCRIBE":
		return d.journalUnsubscribe()
	case "PARTITION_MAP_REQUEST":
		return d.partitionMapRequest(env)
	}
	return d.other(env, frame)
}

// markOps notes in an error that operations are lost with the frame.
func markOps(m Message, err *Error) (Message, *Error) {
	if err == nil {
		return m, nil
	}
	lost := *err
	lost.OpsLost = true
	return nil, &lost
}

// payload moves the decoder to the payload and calls decode.
func payload(d *decoder, env envelope, decode func() (Message, *Error)) (Message, *Error) {
	if env.payload.data == nil {
		return nil, badMessage("payload is missing; want a map")
	}
	d.reader = env.payload
	return decode()
}

// text reads a string of at most limit bytes, or nil, which is empty. Bytes that
// are not UTF-8 are kept.
func (d *decoder) text(field string, limit int, into *string) *Error {
	if d.isNil() {
		*into = ""
		return nil
	}
	s, ok := d.str()
	if !ok {
		return badMessage(field + " must be a string")
	}
	if len(s) > limit {
		return badMessage(field + " is too long")
	}
	*into = string(s)
	return nil
}

// count reads an integer from 0 to 2^53, or nil, which is 0.
func (d *decoder) count(field string, into *uint64) *Error {
	if d.isNil() {
		*into = 0
		return nil
	}
	n, ok := d.integer()
	if !ok {
		return badMessage(field + " must be an integer from 0 to 2^53")
	}
	*into = n
	return nil
}

// readMapName reads a map name. CheckMapName judges it.
func (d *decoder) readMapName(into *string) *Error {
	s, ok := d.str()
	if !ok {
		return badMessage("mapName must be a string")
	}
	*into = d.internMapName(s)
	return nil
}

func (d *decoder) auth() (Message, *Error) {
	m := new(Auth)
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "token":
			return d.text("token", d.lim.MaxTokenBytes, &m.Token)
		case "deviceToken":
			return d.text("deviceToken", d.lim.MaxTokenBytes, &m.DeviceToken)
		case "protocolVersion":
			return d.count("protocolVersion", &m.ProtocolVersion)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) deviceHello() (Message, *Error) {
	m := new(DeviceHello)
	err := d.fields("a frame", func(key []byte) *Error {
		if string(key) == "deviceToken" {
			return d.text("deviceToken", d.lim.MaxTokenBytes, &m.DeviceToken)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) ping() (Message, *Error) {
	m := new(Ping)
	err := d.fields("a frame", func(key []byte) *Error {
		if string(key) != "timestamp" {
			d.skip()
			return nil
		}
		from := d.pos
		f, _, _, ok := d.number()
		if !ok || math.IsNaN(f) || math.IsInf(f, 0) || f < 0 {
			return badMessage("timestamp must be a finite number, not negative")
		}
		m.Timestamp = d.since(from)
		return nil
	})
	return m, err
}

func (d *decoder) syncInit() (Message, *Error) {
	m := new(SyncInit)
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "lastSyncTimestamp":
			return d.count("lastSyncTimestamp", &m.LastSyncTimestamp)
		}
		d.skip()
		return nil
	})
	if err == nil {
		err = CheckMapName(m.MapName)
	}
	return m, err
}

func (d *decoder) orMapSyncInit() (Message, *Error) {
	m := new(ORMapSyncInit)
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "rootHash":
			return d.hash("rootHash", &m.RootHash)
		case "bucketHashes":
			m.BucketHashes = make(map[string]uint32, 16)
			return d.fields("bucketHashes", func(digit []byte) *Error {
				if _, _, ok := merkle.LeafRange(string(digit)); !ok || len(digit) != 1 {
					return badMessage("the keys of bucketHashes must be hex digits")
				}
				var h uint32
				err := d.hash("bucketHashes", &h)
				m.BucketHashes[string(digit)] = h
				return err
			})
		case "lastSyncTimestamp":
			return d.count("lastSyncTimestamp", &m.LastSyncTimestamp)
		case "claimedEpoch":
			m.HasClaimedEpoch = !d.atNil()
			return d.count("claimedEpoch", &m.ClaimedEpoch)
		}
		d.skip()
		return nil
	})
	if err == nil {
		err = CheckMapName(m.MapName)
	}
	return m, err
}

// hash reads a hash.
func (d *decoder) hash(field string, into *uint32) *Error {
	n, ok := d.integer()
	if !ok || n > math.MaxUint32 {
		return badMessage(field + " must be an integer from 0 to 2^32-1")
	}
	*into = uint32(n)
	return nil
}

func (d *decoder) merkleReqBucket() (Message, *Error) {
	m := new(MerkleReqBucket)
	return m, d.bucketRequest(&m.MapName, &m.Path)
}

func (d *decoder) bucketRequest(mapName, path *string) *Error {
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "mapName":
			return d.readMapName(mapName)
		case "path":
			s, ok := d.str()
			if _, _, isPath := merkle.LeafRange(alias(s)); !ok || !isPath {
				return badMessage("path must be a string of 0 to 3 lowercase hex digits")
			}
			*path = string(s)
			return nil
		}
		d.skip()
		return nil
	})
	if err == nil {
		err = CheckMapName(*mapName)
	}
	return err
}

func (d *decoder) queryUnsub() (Message, *Error) {
	m := new(QueryUnsub)
	err := d.fields("payload", func(key []byte) *Error {
		if string(key) == "queryId" {
			return d.text("queryId", maxID, &m.QueryID)
		}
		d.skip()
		return nil
	})
	if err == nil && !validID(m.QueryID) {
		err = badMessage("queryId must be a string of " + idRule)
	}
	return m, err
}

func (d *decoder) querySub() (Message, *Error) {
	m := new(QuerySub)
	var itemErr *Error // the first, in the order of the fields
	err := d.fields("payload", func(key []byte) *Error {
		var err *Error
		switch string(key) {
		case "queryId":
			return d.text("queryId", maxID, &m.QueryID)
		case "mapName":
			err = d.readMapName(&m.MapName)
		case "query":
			m.Query, err = d.query("query")
		case "fields":
			m.Fields, err = d.projection()
		default:
			d.skip()
		}
		if itemErr == nil {
			itemErr = err
		}
		return nil
	})
	switch {
	case err != nil:
	case !validID(m.QueryID):
		err = badMessage("queryId must be a string of " + idRule)
	case itemErr != nil:
		m.Err = itemErr
	default:
		m.Err = CheckMapName(m.MapName)
	}
	return m, err
}

// query reads a map of bounded size, or nil, as its bytes.
func (d *decoder) query(field string) ([]byte, *Error) {
	q := d.raw()
	switch {
	case q[0] == 0xc0:
		return nil, nil
	case !isMap(q):
		return nil, badMessage(field + " must be a map")
	case len(q) > d.lim.MaxQueryBytes || d.tooDeep(q):
		return nil, queryTooComplex()
	}
	return q, nil
}

func queryTooComplex() *Error {
	return &Error{Name: QueryTooComplex, Code: 400, Text: "the query is too large or nested too deeply"}
}

// maxFields bounds the fields of a projection.
const maxFields = 256

// projection reads an array of strings, or nil.
func (d *decoder) projection() ([]string, *Error) {
	if d.isNil() {
		return nil, nil
	}
	n, isArray := d.arrayHeader()
	var fields []string
	allStrings := true
	for range n {
		s, ok := d.str()
		allStrings = allStrings && ok
		if len(fields) <= maxFields {
			fields = append(fields, string(s))
		}
	}
	switch {
	case !isArray || !allStrings:
		return nil, badMessage("fields must be an array of strings")
	case n > maxFields:
		return nil, &Error{Name: QueryTooComplex, Code: 400, Text: "fields names more than 256 fields"}
	}
	return fields, nil
}

// other reads what a refusal has to name.
func (d *decoder) other(env envelope, frame []byte) (Message, *Error) {
	m := &Other{TypeName: string(env.typ), Frame: frame}
	visit := func(key []byte) *Error {
		var into *string
		switch string(key) {
		case "requestId":
			into = &m.RequestID
		case "queryId":
			into = &m.QueryID
		case "subscriptionId":
			into = &m.SubscriptionID
		case "id":
			into = &m.ID
		case "mapName":
			into = &m.MapName
		default:
			d.skip()
			return nil
		}
		// Of a type that is not known nothing is known of its fields either.
		if s, ok := d.str(); ok && len(s) <= maxKey {
			*into = string(s)
		}
		return nil
	}
	if err := d.fields("a frame", visit); err != nil {
		return nil, err
	}
	if env.payload.data != nil {
		d.reader = env.payload
		if _, ok := d.mapHeader(); !ok {
			return m, nil
		}
		d.reader = env.payload
		if err := d.fields("payload", visit); err != nil {
			return nil, err
		}
	}
	return m, nil
}
