import java.io.IOException;
import java.io.OutputStream;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.KeyValue;
import org.apache.kafka.streams.StoreQueryParameters;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueIterator;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.QueryableStoreTypes;
import org.apache.kafka.streams.state.Stores;

/**
 * Both works in Kafka Streams: state in RocksDB with a changelog in Kafka, at least once, the record cache on. Windows
 * are closed when the newest reading of their partition is past their end by the lateness, the last ones at the end.
 */
public final class KafkaStreamsPeer {
    static final long WINDOW_US = 600_000_000L;
    static final long LATENESS_US = 1_800_000_000L;
    static final String STORE = "state";
    static final CountDownLatch ALL_TAKEN = new CountDownLatch(1);

    /** bootstrap topic work out threads. */
    public static void main(String[] arguments) throws Exception {
        String topic = arguments[1];
        Path out = Path.of(arguments[3]);
        Path rows = Files.createDirectories(out.resolve("rows"));
        boolean isDeltas = arguments[2].equals("deltas");
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, "bench-" + System.nanoTime());
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, arguments[0]);
        settings.put(StreamsConfig.STATE_DIR_CONFIG, out.resolve("state").toString());
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, arguments[4]);
        settings.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, 64L << 20);
        settings.put("auto.offset.reset", "earliest");
        settings.put("compression.type", "lz4");
        StreamsBuilder builder = new StreamsBuilder();
        Serde<byte[]> bytes = Serdes.ByteArray();
        builder.addStateStore(isDeltas
            ? Stores.keyValueStoreBuilder(Stores.persistentKeyValueStore(STORE), Serdes.String(), bytes).withCachingEnabled()
            : Stores.keyValueStoreBuilder(Stores.persistentKeyValueStore(STORE), Serdes.Bytes(), bytes).withCachingEnabled());
        var readings = builder.stream(topic, Consumed.with(bytes, bytes));
        if (isDeltas) {
            readings.process(() -> new Deltas(rows), STORE);
        } else {
            readings.process(() -> new Windows(rows), STORE);
        }
        KafkaStreams streams = new KafkaStreams(builder.build(), settings);
        streams.start();
        ALL_TAKEN.await();
        if (!isDeltas) {
            var store = streams.store(
                StoreQueryParameters.fromNameAndType(STORE, QueryableStoreTypes.<Bytes, byte[]>keyValueStore()));
            try (Rows open = new Rows(rows.resolve("open.csv")); var all = store.all()) {
                while (all.hasNext()) {
                    KeyValue<Bytes, byte[]> each = all.next();
                    Windows.write(open, each.key.get(), each.value);
                }
            }
        }
        streams.close();
        System.exit(0);
    }

    /** Rows as text in a file. */
    static final class Rows implements AutoCloseable {
        final StringBuilder text = new StringBuilder();
        private final OutputStream file;

        Rows(Path path) {
            try {
                file = Files.newOutputStream(path);
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }

        void written() {
            if (text.length() > 1 << 16) {
                flush();
            }
        }

        private void flush() {
            try {
                file.write(text.toString().getBytes(StandardCharsets.ISO_8859_1));
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
            text.setLength(0);
        }

        @Override
        public void close() {
            flush();
            try {
                file.close();
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }
    }

    /** A task's processor, with a file of its own. */
    abstract static class Task<K> implements Processor<byte[], byte[], Void, Void> {
        private final Path folder;
        KeyValueStore<K, byte[]> store;
        Rows rows;

        Task(Path folder) {
            this.folder = folder;
        }

        @Override
        public void init(ProcessorContext<Void, Void> context) {
            store = context.getStateStore(STORE);
            rows = new Rows(folder.resolve(context.taskId() + "-" + System.nanoTime() + ".csv"));
        }

        @Override
        public void process(Record<byte[], byte[]> record) {
            take(Reading.decode(record.value()));
            rows.written();
            if (Reading.Progress.one()) {
                ALL_TAKEN.countDown();
            }
        }

        abstract void take(Reading reading);

        @Override
        public void close() {
            rows.close();
        }
    }

    static final class Deltas extends Task<String> {
        Deltas(Path folder) {
            super(folder);
        }

        @Override
        void take(Reading reading) {
            byte[] known = store.get(reading.meter);
            ByteBuffer last = known == null ? null : ByteBuffer.wrap(known);
            long lastUs = last == null ? Reading.ABSENT : last.getLong(0);
            Reading.delta(rows.text, reading, lastUs, last == null ? 0 : last.getLong(8));
            if (reading.observedUs > lastUs) {
                store.put(reading.meter, ByteBuffer.allocate(16).putLong(reading.observedUs).putLong(reading.wh).array());
            }
        }
    }

    /** Key: begin of the window, meter. Value: count, least, largest and sum of each phase, then the times seen. */
    static final class Windows extends Task<Bytes> {
        private static final int PHASE_BYTES = 32;
        private static final int TIMES = 3 * PHASE_BYTES;
        private long newestUs = Long.MIN_VALUE;
        private long closedToUs = 0;

        Windows(Path folder) {
            super(folder);
        }

        @Override
        void take(Reading reading) {
            long startUs = Math.floorDiv(reading.observedUs, WINDOW_US) * WINDOW_US;
            byte[] meter = reading.meter.getBytes(StandardCharsets.ISO_8859_1);
            Bytes key = Bytes.wrap(ByteBuffer.allocate(8 + meter.length).putLong(startUs).put(meter).array());
            byte[] known = store.get(key);
            int length = known == null ? TIMES : known.length;
            ByteBuffer value = ByteBuffer.allocate(length + 8);
            if (known != null) {
                value.put(0, known);
                for (int at = TIMES; at < length; at += 8) {
                    if (value.getLong(at) == reading.observedUs) {
                        return;
                    }
                }
            }
            for (int phase = 0; phase < 3; phase++) {
                long mv = reading.voltage(phase);
                if (mv == Reading.ABSENT) {
                    continue;
                }
                int at = phase * PHASE_BYTES;
                long count = value.getLong(at);
                value.putLong(at, count + 1);
                value.putLong(at + 8, count == 0 ? mv : Math.min(mv, value.getLong(at + 8)));
                value.putLong(at + 16, count == 0 ? mv : Math.max(mv, value.getLong(at + 16)));
                value.putLong(at + 24, value.getLong(at + 24) + mv);
            }
            value.putLong(length, reading.observedUs);
            store.put(key, value.array());
            newestUs = Math.max(newestUs, reading.observedUs);
            long overToUs = Math.floorDiv(newestUs - LATENESS_US, WINDOW_US) * WINDOW_US;
            if (overToUs > closedToUs) {
                close(overToUs);
                closedToUs = overToUs;
            }
        }

        private void close(long endUs) {
            List<Bytes> over = new ArrayList<>();
            Bytes to = Bytes.wrap(ByteBuffer.allocate(8).putLong(endUs).array());
            try (KeyValueIterator<Bytes, byte[]> windows = store.range(Bytes.wrap(new byte[8]), to)) {
                while (windows.hasNext()) {
                    KeyValue<Bytes, byte[]> each = windows.next();
                    write(rows, each.key.get(), each.value);
                    over.add(each.key);
                }
            }
            over.forEach(store::delete);
        }

        static void write(Rows rows, byte[] key, byte[] bytes) {
            ByteBuffer value = ByteBuffer.wrap(bytes);
            String meter = new String(key, 8, key.length - 8, StandardCharsets.ISO_8859_1);
            long startUs = ByteBuffer.wrap(key).getLong();
            for (int phase = 0; phase < 3; phase++) {
                int at = phase * PHASE_BYTES;
                if (value.getLong(at) > 0) {
                    Reading.window(rows.text, meter, phase, startUs, value.getLong(at), value.getLong(at + 8),
                        value.getLong(at + 16), value.getLong(at + 24));
                }
            }
            rows.written();
        }
    }

    private KafkaStreamsPeer() {}
}
